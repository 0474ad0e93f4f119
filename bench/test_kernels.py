"""Every op at ConvNeXt-L's shapes, one picture, as pytest-benchmark tests, comparable from commit to commit.

`pytest bench/ --benchmark-only --benchmark-compare` measures and compares with the last file in `bench/baseline`,
`--benchmark-autosave` adds one. Each op runs eager and as the dispatcher chooses, and what it chooses is held against
float64 before it is timed. `python -m bench kernels` measures more and more carefully.
"""

import time
from functools import lru_cache
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.compare import check
from bench.conftest import DEVICE
from bench.shapes import LARGE
from bench.suites.kernel_cases import DIRECTIONS, OpCase, cases
from bench.suites.kernel_problems import Problem, make_problem
from bench.suites.kernels import EAGER, automatic, build
from bench.timing import Call, synchronize
from mra_kernels.ops import OPS
from mra_model.environment import DTYPES

AUTOMATIC = "automatic"
TYPES = ("bfloat16", "float32")

# Seconds for the timed calls of one test, within these numbers of rounds.
SECONDS = 0.25
ROUNDS = (3, 200)


def _parameters() -> list[Any]:
    """One test each; consecutive tests share their data."""
    return [
        pytest.param(case, dtype, direction, side, id=f"{_slug(case)}-{dtype}-{direction}-{side}")
        for op in sorted(OPS)
        for case in cases(op, [LARGE])
        for dtype in TYPES
        for direction in DIRECTIONS
        for side in (EAGER, AUTOMATIC)
    ]


def _slug(case: OpCase) -> str:
    """The case in one word, the same from commit to commit."""
    return "-".join(text.replace(",", "").replace(" ", "_") for text in (case.op, case.place, case.shape))


@pytest.mark.parametrize(("case", "dtype", "direction", "side"), _parameters())
def test_kernel(benchmark: BenchmarkFixture, case: OpCase, dtype: str, direction: str, side: str) -> None:
    """Checks one op in one direction, then times it."""
    problem = _problem(case, dtype)
    variants = automatic(case.op, DEVICE, DTYPES[dtype])
    built = build(problem, DTYPES[dtype], direction, variants)
    # Where the dispatcher chooses eager, both sides are the same.
    variant = list(built.variants)[-1 if side == AUTOMATIC else 0]
    if variant != EAGER:
        errors, failures = check(built)
        assert not failures, failures
        benchmark.extra_info["errors"] = errors[variant]
    benchmark.group = f"{case.name}, {dtype} {direction}"
    benchmark.extra_info["variant"] = variant
    call = _finished(built.variants[variant])
    benchmark.pedantic(call, rounds=_rounds(call))


@lru_cache(maxsize=1)
def _problem(case: OpCase, dtype: str) -> Problem:
    return make_problem(case, 1, DTYPES[dtype], DEVICE)


def _finished(call: Call) -> Call:
    """The call, which returns when its work is done: pytest-benchmark reads the wall clock."""

    def finished() -> Any:
        outputs = call()
        synchronize(DEVICE)
        return outputs

    return finished if DEVICE.type == "cuda" else call


def _rounds(call: Call) -> int:
    """How many calls fit into `SECONDS`. It warms up, too: the first call of a backward also runs the forward."""
    call()
    begin = time.perf_counter()
    call()
    low, high = ROUNDS
    return min(high, max(low, int(SECONDS / (time.perf_counter() - begin))))
