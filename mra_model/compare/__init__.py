"""`mra compare`: one picture and one prompt through eager and fused, on the same parameters, in turns.

Eager is the backend `reference`, plain PyTorch as the paper writes it. Fused is the automatic choice, or what
`MRA_BACKEND` says; it is also optimized where that was asked for.
"""

import os
import time
from collections.abc import Callable

import torch
from transformers import LlavaForConditionalGeneration

from mra_kernels import use_backend
from mra_kernels.dispatch import choose
from mra_kernels.ops import OPS
from mra_model.compare.agreement import judge
from mra_model.compare.measure import (
    Run,
    Way,
    answer,
    optimizable_parts_of,
    optimized,
    outputs,
    parts_of,
    what_optimizes,
)
from mra_model.compare.peak import measure_peak
from mra_model.compare.result import EAGER, FUSED, SIDES, Comparison, to_json
from mra_model.compare.subject import Options, Subject, prepare
from mra_model.environment import busy_seconds, keep_freed_memory

# Tokens of an answer, the first included.
NEW_TOKENS = 64

DEFAULT_RUNS = {"cpu": 3, "cuda": 10}

# Without --runs no further pair of runs starts that would end after this many seconds, so that a slow CPU in float32,
# at 16 s for a forward pass, keeps the whole command under three minutes.
BUDGET_SECONDS = 150.0

# Where other programs use more than this share of the processor, a CPU's times say little.
BUSY_SHARE = 0.1

Stage = Callable[[str], None]


def compare(
    options: Options, subject: Subject, runs: int | None, stage: Stage, started: float | None = None
) -> Comparison:
    """Measures eager and fused, about three minutes at most on two CPU cores with the default options.

    Args:
        options: what was asked for; the processes that measure memory prepare it again.
        subject: `prepare(options)`.
        runs: how many timed answers of each; None is `DEFAULT_RUNS`, fewer where the time runs out.
        stage: called with the name of each step before it starts; `stage_count` is how often.
        started: `time.perf_counter()` when the command started, for the budget; None is now.

    Raises:
        BackendUnavailable: the fused side names a backend that cannot serve.
        ValueError: `MRA_BACKEND` makes both sides eager.
    """
    started = time.perf_counter() if started is None else started
    ways = side_ways(options)
    backends = {side: served_by(ways[side].backend, subject.device, subject.dtype) for side in SIDES}
    conditions = []
    peaks = {}
    for side in SIDES:
        stage(f"peak memory, {side}")
        peaks[side] = measure_peak(options, ways[side])
    if subject.device.type == "cpu" and keep_freed_memory():
        conditions.append("the allocator keeps freed memory on both sides, so that page faults do not decide")
    stage("building the model")
    model = subject.build()
    changes = None
    if options.optimize:
        changes = what_optimizes(model)
        conditions.append("parts that hooks would keep from being optimized are in `rest`")
    found = {}
    for side in SIDES:
        stage(f"warm-up and outputs, {side}")
        found[side] = outputs(model, subject.inputs, ways[side])
    timed, notes = _timed_runs(model, subject, ways, runs, stage, started)
    agreement = judge(found[EAGER], found[FUSED], timed[EAGER], timed[FUSED], subject.dtype)
    return Comparison(subject, backends, changes, agreement, timed, peaks, [*subject.notes, *conditions, *notes])


def stage_count(runs: int | None, device: torch.device) -> int:
    """How many steps `compare` announces, at most."""
    return 5 + 2 * (runs or DEFAULT_RUNS[device.type])


def check_backends(options: Options, subject: Subject) -> None:
    """Raises before anything is built where the fused side cannot run.

    Raises:
        BackendUnavailable: `MRA_BACKEND` names a backend that cannot serve.
        ValueError: `MRA_BACKEND` makes both sides eager.
    """
    for way in side_ways(options).values():
        served_by(way.backend, subject.device, subject.dtype)


def side_ways(options: Options) -> dict[str, Way]:
    """By side, how it computes.

    Raises:
        ValueError: both would be eager.
    """
    fused = os.environ.get("MRA_BACKEND") or "auto"
    if fused == "reference":
        raise ValueError("MRA_BACKEND=reference makes both sides of the comparison eager: unset it")
    return {EAGER: Way("reference"), FUSED: Way(fused, optimized if options.optimize else None)}


def served_by(backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """By op, which backend serves it under `use_backend(backend)`.

    Raises:
        BackendUnavailable: none can.
    """
    with use_backend(backend):
        return {name: choose(name, op.backends, device, dtype) for name, op in OPS.items()}


def _timed_runs(
    model: LlavaForConditionalGeneration,
    subject: Subject,
    ways: dict[str, Way],
    runs: int | None,
    stage: Stage,
    started: float,
) -> tuple[dict[str, list[Run]], list[str]]:
    """The sides in turns; each pair starts with the other side, so that none always follows the same one."""
    wanted = runs or DEFAULT_RUNS[subject.device.type]
    if subject.device.type == "cuda":
        # The first decode step still allocates, picks kernels and compiles.
        for side in SIDES:
            _timed_answer(model, subject, ways, side)
    timed: dict[str, list[Run]] = {side: [] for side in SIDES}
    notes = []
    neighbors = _Neighbors()
    for index in range(wanted):
        begin = time.perf_counter()
        for side in SIDES if index % 2 == 0 else SIDES[::-1]:
            stage(f"run {index + 1} of {wanted}, {side}")
            timed[side].append(_timed_answer(model, subject, ways, side))
        end = time.perf_counter()
        if runs is None and index + 1 < wanted and 2 * end - begin - started > BUDGET_SECONDS:
            done = index + 1
            notes.append(f"{done} of {wanted} runs, as more would take too long; --runs {wanted} does them all")
            break
    return timed, notes + neighbors.note()


def _timed_answer(model: LlavaForConditionalGeneration, subject: Subject, ways: dict[str, Way], side: str) -> Run:
    parts = parts_of(model) if ways[FUSED].optimizer is None else optimizable_parts_of(model)
    with ways[side].on(model):
        return answer(model, subject.inputs, NEW_TOKENS, parts)


class _Neighbors:
    """How much of the processor other programs use, from its making on."""

    def __init__(self) -> None:
        self._begin = (busy_seconds(), time.process_time(), time.perf_counter())

    def note(self) -> list[str]:
        """A warning, where it is more than `BUSY_SHARE` and the system tells."""
        busy, begun = busy_seconds(), self._begin[0]
        if busy is None or begun is None:
            return []
        own, wall = time.process_time() - self._begin[1], time.perf_counter() - self._begin[2]
        share = (busy - begun - own) / (wall * (os.cpu_count() or 1))
        if share <= BUSY_SHARE:
            return []
        return [f"other programs used {share:.0%} of the processor during the runs: the times are unreliable"]


__all__ = [
    "EAGER",
    "FUSED",
    "NEW_TOKENS",
    "SIDES",
    "Comparison",
    "Options",
    "Subject",
    "check_backends",
    "compare",
    "prepare",
    "side_ways",
    "stage_count",
    "to_json",
]
