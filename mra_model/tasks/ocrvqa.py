"""What `ocrvqa.yaml` calls."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image


def one_question_a_row(documents: Any) -> Any:
    """A `datasets.Dataset` with `questions` and `answers` a row -> one with a `question` and an `answer` a row."""
    questions, answers = documents["questions"], documents["answers"]
    rows = [row for row, asked in enumerate(questions) for _ in asked]
    repeated = documents.select_columns(["image"]).select(rows)
    repeated = repeated.add_column("question", [question for asked in questions for question in asked])
    return repeated.add_column("answer", [answer for given in answers for answer in given])


def doc_to_visual(document: Mapping[str, Any]) -> list[Image.Image]:
    """The cover."""
    return [document["image"].convert("RGB")]


def doc_to_text(document: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
    """The question in the prompt of a model."""
    prompt = lmms_eval_specific_kwargs
    return f"{prompt['pre_prompt']}{document['question']}{prompt['post_prompt']}"


def process_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the answer is the right one but for case, spaces and a full stop at its end."""
    return {"exact_match": float(_plain(results[0]) == _plain(document["answer"]))}


def _plain(answer: str) -> str:
    return re.sub(r"\s+", " ", answer).strip().rstrip(".").strip().lower()
