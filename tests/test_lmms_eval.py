"""lmms-eval's model and tasks, held to its source: it wants torchvision, and is not installed with the tests.

Its registry takes a `ModelManifest` from an entry point; its task files are YAML with a `!function` tag. Both are
recorded here from version 0.7.3.
"""

import importlib.util
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from mra_model.cli import app

# Names of lmms-eval's own tasks, all of which are `task:` of a file in it.
THEIRS = {
    "vqav2_val",
    "gqa",
    "ok_vqa_val2014",
    "scienceqa_img",
    "vizwiz_vqa_val",
    "textvqa_val",
    "mme",
    "pope",
    "seedbench",
    "mmvet",
}
GROUP_KEYS = {"group", "task"}
TASK_KEYS = {
    *("task", "dataset_path", "test_split", "output_type", "process_docs", "doc_to_visual", "doc_to_text"),
    *("doc_to_target", "generation_kwargs", "process_results", "metric_list", "lmms_eval_specific_kwargs", "metadata"),
}


@dataclass(frozen=True)
class ModelManifest:
    """lmms_eval.models.registry_v2.ModelManifest."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Loader(yaml.SafeLoader):
    """Gives a `!function` as its name."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.fixture
def folder() -> Path:
    """What `mra eval-tasks` prints."""
    result = CliRunner().invoke(app, ["eval-tasks"])
    assert result.exit_code == 0
    return Path(result.stdout.strip())


def read(file: Path) -> dict[str, Any]:
    return yaml.load(file.read_text(), Loader)  # noqa: S506


def load(file: Path) -> ModuleType:
    """As lmms-eval loads the module that a `!function` names: by its path, without a package."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ocrvqa(folder: Path) -> ModuleType:
    return load(folder / "ocrvqa.py")


def test_the_model_is_their_class_for_llava(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lmms_eval", "lmms_eval.models", "lmms_eval.models.registry_v2"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest  # type: ignore[attr-defined]
    (entry,) = entry_points(group="lmms_eval.models", name="llava_hr")
    manifest = entry.load()()
    assert manifest == ModelManifest("llava_hr", simple_class_path="lmms_eval.models.simple.llava_hf.LlavaHf")


def test_the_group_has_the_papers_eleven_tasks(folder: Path) -> None:
    group = read(folder / "llava_hr.yaml")
    assert group.keys() == GROUP_KEYS
    assert group["group"] == "llava_hr"
    names = [task if isinstance(task, str) else task["task"] for task in group["task"]]
    assert len(names) == len(set(names)) == 11
    assert set(names) == THEIRS | {"ocrvqa"}


def test_prompts_are_those_of_the_paper(folder: Path) -> None:
    """What stands in a group replaces the task's own, whole."""
    changed = {task["task"]: task for task in read(folder / "llava_hr.yaml")["task"] if isinstance(task, dict)}
    assert changed.keys() == {"ok_vqa_val2014", "textvqa_val", "mmvet"}
    prompts = {name: task["lmms_eval_specific_kwargs"]["default"] for name, task in changed.items()}
    assert all(prompt.keys() - {"ocr"} == {"pre_prompt", "post_prompt"} for prompt in prompts.values())
    assert [name for name, prompt in prompts.items() if prompt.get("ocr")] == ["textvqa_val"]
    assert prompts["mmvet"]["pre_prompt"] == ""
    assert prompts["ok_vqa_val2014"]["post_prompt"] == "\nAnswer the question using a single word or phrase."


def test_every_function_of_a_task_exists(folder: Path) -> None:
    files = sorted(folder.glob("*.yaml"))
    assert [file.name for file in files] == ["llava_hr.yaml", "ocrvqa.yaml"]
    task = read(folder / "ocrvqa.yaml")
    assert task.keys() <= TASK_KEYS
    functions = [value for value in task.values() if isinstance(value, str) and value.startswith("ocrvqa.")]
    assert len(functions) == 4
    for function in functions:
        module, name = function.split(".")
        assert callable(getattr(load(folder / f"{module}.py"), name))


class Rows:
    """The methods of `datasets.Dataset` that the task calls."""

    def __init__(self, columns: dict[str, list]) -> None:
        self.columns = columns

    def __getitem__(self, name: str) -> list:
        return self.columns[name]

    def select_columns(self, names: list[str]) -> "Rows":
        return Rows({name: self.columns[name] for name in names})

    def select(self, rows: list[int]) -> "Rows":
        return Rows({name: [column[row] for row in rows] for name, column in self.columns.items()})

    def add_column(self, name: str, column: list) -> "Rows":
        assert len(column) == len(next(iter(self.columns.values())))
        return Rows(self.columns | {name: column})


def test_one_question_a_row(ocrvqa: ModuleType) -> None:
    documents = Rows(
        {
            "image": ["a", "b", "c"],
            "title": ["A", "B", "C"],
            "questions": [["a1", "a2"], [], ["c1"]],
            "answers": [["1", "2"], [], ["3"]],
        }
    )
    assert ocrvqa.one_question_a_row(documents).columns == {
        "image": ["a", "a", "c"],
        "question": ["a1", "a2", "c1"],
        "answer": ["1", "2", "3"],
    }


def test_a_question_becomes_a_prompt_and_a_picture(ocrvqa: ModuleType, folder: Path) -> None:
    document = {"image": Image.new("L", (5, 4)), "question": "Who wrote this book?", "answer": "Ann"}
    prompt = read(folder / "ocrvqa.yaml")["lmms_eval_specific_kwargs"]["default"]
    text = ocrvqa.doc_to_text(document, prompt)
    assert text == "Who wrote this book?\nAnswer the question using a single word or phrase."
    (picture,) = ocrvqa.doc_to_visual(document)
    assert (picture.mode, picture.size) == ("RGB", (5, 4))


@pytest.mark.parametrize(
    ("answer", "said", "right"),
    [
        ("Ann Lee", "Ann Lee", 1.0),
        ("Ann Lee", " ann  lee. ", 1.0),
        ("Yes", "yes", 1.0),
        ("Ann Lee", "Ann", 0.0),
        ("No", "Not", 0.0),
    ],
)
def test_only_the_right_answer_counts(ocrvqa: ModuleType, answer: str, said: str, right: float) -> None:
    assert ocrvqa.process_results({"answer": answer}, [said]) == {"exact_match": right}
