"""The paper's table: what an answer costs from the picture's pixels on, LLaVA-HR beside LLaVA-1.5.

Both families have the same language models, the same question and the same `generate()`, at batch 1. Every variant of a
family computes on the same parameters, in turns.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from bench.memory import peak
from bench.models import (
    LLAVA_15,
    LLAVA_HR,
    Subject,
    choose,
    make_inputs,
    optimized_llava_15,
    parts_of,
    weights_bytes,
)
from bench.step import Result, Run
from bench.timing import summarize
from mra_model.compare.agreement import TOLERANCES, relative_difference
from mra_model.compare.measure import Run as Answer
from mra_model.compare.measure import Way, answer, optimized, outputs
from mra_model.memory import NotEnoughMemory

# By family, the ways to compute; LLaVA-1.5 has no op of ours. The first is what the others must agree with.
VARIANTS = {
    LLAVA_HR: {"eager": Way("reference"), "fused": Way("auto"), "optimized": Way("auto", optimized)},
    LLAVA_15: {"eager": Way("reference"), "optimized": Way("reference", optimized_llava_15)},
}

# The lengths of answers whose cost is reported: the authors time 10 tokens.
LENGTHS = {"first token": 1, "10 tokens": 10, "64 tokens": 64}

ROUNDS = {"cuda": 7, "cpu": 3}

# Logits may differ this many times as much as vision features: the language model's own rounding comes on top, layer
# by layer.
LOGITS_FACTOR = 5.0


def run(run: Run, *, family: str, language: str, side: int) -> None:
    """One row of the table: the answer's times, the first token's parts, and memory, of every variant.

    Args:
        run: of the step.
        family: `LLaVA-HR` or `LLaVA-1.5`.
        language: `7B`, `13B` or `small`.
        side: of the picture, in pixels.
    """
    subject = choose(run, family, language, side)
    variants = _variants(run, family)
    try:
        model = subject.build(run.device)
    except NotEnoughMemory as error:
        for variant in variants:
            run.record(_result(subject, variant, failure=f"NotEnoughMemory: {error}"))
        return
    config = model.config
    inputs = make_inputs(config, run.device)
    facts, failures = check(model, inputs, variants, subject.dtype)
    good = {variant: way for variant, way in variants.items() if variant not in failures}
    answers, watched = _rounds(run, model, inputs, good)
    shared = {
        "visual tokens": config.image_seq_length,
        "prompt tokens": inputs["input_ids"].shape[1],
        "weights bytes": weights_bytes(model),
    }
    if inputs["input_ids"].shape[1] + max(LENGTHS.values()) > config.text_config.max_position_embeddings:
        shared["positions"] = f"beyond the {config.text_config.max_position_embeddings} that it was trained with"
    baseline = next(iter(variants))
    for variant, way in variants.items():
        found = shared | facts.get(variant, {})
        if variant in failures:
            run.record(_result(subject, variant, failure=failures[variant], facts=found))
            continue
        found |= _peak_facts(run, subject, model, inputs, way)
        if variant != baseline and baseline in answers:
            found["tokens equal to eager's"] = _equal(answers[baseline][0].tokens, answers[variant][0].tokens)
        run.record(_measured(subject, variant, answers[variant], watched[variant], found))


def _variants(run: Run, family: str) -> dict[str, Way]:
    """On a CPU nothing of LLaVA-1.5 is optimized, and its eager is not measured twice; a rehearsal tries all."""
    alone = family == LLAVA_15 and run.device.type == "cpu" and not run.rehearsal
    return {name: way for name, way in VARIANTS[family].items() if way.optimizer is None or not alone}


def check(
    model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor], variants: Mapping[str, Way], dtype: torch.dtype
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Computes the first token once by each variant.

    Args:
        model: in evaluation mode.
        inputs: see `bench.models.make_inputs`.
        variants: by name, the way; the others must agree with the first.
        dtype: of the model.

    Returns:
        By variant, how far it is from the first one; and by variant, why its times must not be shown.
    """
    facts: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    expected: tuple[Tensor, Tensor] | None = None
    for index, (variant, way) in enumerate(variants.items()):
        try:
            computed = outputs(model, inputs, way)
        except torch.OutOfMemoryError as error:
            failures[variant] = f"OutOfMemoryError: {error}".splitlines()[0]
            continue
        features, logits = computed.vision_features, computed.logits[:, -1]
        if not bool(features.isfinite().all() and logits.isfinite().all()):
            failures[variant] = "wrong: vision features or logits are not finite"
        elif index == 0:
            expected = features, logits
        elif expected is None:
            failures[variant] = f"not checked: {next(iter(variants))} gives nothing to compare with"
        else:
            apart = relative_difference(features, expected[0]), relative_difference(logits, expected[1])
            facts[variant] = {"features differ by": apart[0], "logits differ by": apart[1]}
            allowed = TOLERANCES[dtype], LOGITS_FACTOR * TOLERANCES[dtype]
            for name, found, most in zip(("vision features", "logits"), apart, allowed, strict=True):
                # Written so that a NaN fails.
                if not found <= most:
                    failures.setdefault(variant, f"wrong: {name} differ by {found:.2e}, more than {most:.0e}")
    return facts, failures


def _rounds(
    run: Run, model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor], variants: Mapping[str, Way]
) -> tuple[dict[str, list[Answer]], dict[str, list[Answer]]]:
    """By variant, the answers that are timed, and those whose parts are; the variants take turns."""
    rounds, longest = run.pick(ROUNDS[run.device.type], 1), max(LENGTHS.values())
    if run.device.type == "cpu":
        # Reading the clock costs nothing beside a first token of seconds: one round gives both.
        answers = _turns(model, inputs, variants, rounds, longest, watch=True)
        return answers, answers
    # The first answer still allocates and picks kernels.
    _turns(model, inputs, variants, 1, longest, watch=False)
    answers = _turns(model, inputs, variants, rounds, longest, watch=False)
    return answers, _turns(model, inputs, variants, rounds, 1, watch=True)


def _turns(
    model: LlavaForConditionalGeneration,
    inputs: Mapping[str, Tensor],
    variants: Mapping[str, Way],
    rounds: int,
    count: int,
    *,
    watch: bool,
) -> dict[str, list[Answer]]:
    found: dict[str, list[Answer]] = {variant: [] for variant in variants}
    names = list(variants)
    for index in range(rounds):
        # Each round starts with another variant, so that none always follows the same one.
        shift = index % max(1, len(names))
        for variant in names[shift:] + names[:shift]:
            found[variant].append(_answer(model, inputs, variants[variant], count, watch))
    return found


def _answer(
    model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor], way: Way, count: int, watch: bool = False
) -> Answer:
    with way.on(model):
        return answer(model, inputs, count, parts_of(model) if watch else {})


def _measured(
    subject: Subject, variant: str, answers: Sequence[Answer], watched: Sequence[Answer], facts: dict[str, Any]
) -> Result:
    times = {name: summarize([1e6 * a.reached[count - 1] for a in answers]) for name, count in LENGTHS.items()}
    facts["tower's share of the first token"] = round(median(a.parts["tower"] / a.reached[0] for a in watched), 4)
    for name, count in list(LENGTHS.items())[1:]:
        facts[f"tokens per second over {count}"] = round(1e6 * count / times[name].median, 3)
    parts = {name: round(1e6 * median(a.parts[name] for a in watched), 3) for name in watched[0].parts}
    return _result(subject, variant, times=times, parts=parts, facts=facts)


def _result(subject: Subject, variant: str, **found: Any) -> Result:
    labels = {"suite": "e2e", "model": subject.family} | subject.labels()
    return Result(f"answer of {subject}", variant, labels, **found)


def _equal(expected: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens the answers have in common before the first that differs."""
    pairs = enumerate(zip(expected, tokens, strict=True))
    return next((index for index, (one, other) in pairs if one != other), len(tokens))


def _peak_facts(
    run: Run, subject: Subject, model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor], way: Way
) -> dict[str, Any]:
    """The most bytes that weights and the start of an answer take, or why that is unknown."""
    if run.device.type == "cuda" and way.optimizer is not None:
        return {
            "peak bytes unknown": "CUDA graphs of earlier answers hold memory; `mra compare --optimize` measures it"
        }
    try:
        # What a CPU's allocator kept from earlier answers would be taken for this one's inputs.
        fresh = run.device.type == "cpu" and not run.rehearsal
        found = peak_in_new_process(subject, way) if fresh else _peak(model, inputs, way)
    except BrokenProcessPool:
        return {"peak bytes unknown": "the process that measured it was ended, probably for want of memory"}
    if found is None:
        return {"peak bytes unknown": "the system keeps no high-water mark"}
    return {"peak bytes": found}


def peak_in_new_process(subject: Subject, way: Way) -> int | None:
    """`_peak` on a CPU in a process of its own, where nothing else was allocated before.

    Raises:
        BrokenProcessPool: the process was ended.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_build_and_peak, subject, way).result()


def _build_and_peak(subject: Subject, way: Way) -> int | None:
    model = subject.build("cpu")
    return _peak(model, make_inputs(model.config, torch.device("cpu")), way)


def _peak(model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor], way: Way) -> int | None:
    """The weights and what two tokens take beyond them, in bytes."""
    beyond = peak(lambda: _answer(model, inputs, way, 2), inputs["input_ids"].device)
    return None if beyond is None else weights_bytes(model) + beyond
