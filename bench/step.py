"""A step of a benchmark run: what it is called, how long it should take, and what it is given when it runs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Times:
    """Durations of one variant in microseconds: the median, the 20th and 80th percentile, and every sample."""

    median: float
    p20: float
    p80: float
    samples: list[float]


@dataclass(frozen=True)
class Result:
    """One variant of one case.

    Args:
        case: what is computed, and at which shape.
        variant: who computes it.
        times: by condition: `warm` and `cold` are kernel times by graph replay with a warm and a cold L2,
            `call` is what a caller waits for one call, launch gaps included.
        errors: by output, |out - exact| / |exact| against the same computation in float64.
        bytes: that the case must move at least, each input read and each output written once.
        flops: that the case must do at least; a multiply-add counts two.
        kernels: what ran, slowest first, the rest left out: name, calls, microseconds.
        launches: how many kernels ran.
        failure: why there are no times, or why they must not be trusted.
        facts: anything else worth keeping.
    """

    case: str
    variant: str
    times: dict[str, Times] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    bytes: int | None = None
    flops: int | None = None
    kernels: list[dict[str, Any]] = field(default_factory=list)
    launches: int | None = None
    failure: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What a step is given.

    Args:
        device: to measure on.
        rehearsal: tiny shapes and one repetition, to show that the code runs; its times mean nothing.
        folder: for a step's own log.
        record: keeps a result at once.
    """

    device: torch.device
    rehearsal: bool
    folder: Path
    record: Callable[[Result], None]

    def pick(self, real: T, tiny: T) -> T:
        """`tiny` in a rehearsal, otherwise `real`."""
        return tiny if self.rehearsal else real


@dataclass(frozen=True)
class Step:
    """One measurement, run in a worker process, so that its failure costs the others nothing.

    Args:
        name: for `--only`.
        about: one line for the list of steps.
        seconds: estimate on an H100; a step that takes longer than `limit` is stopped.
        run: does it; must be picklable, because it travels to the worker.
    """

    name: str
    about: str
    seconds: float
    run: Callable[[Run], None]

    @property
    def limit(self) -> float:
        """Seconds after which the step is stopped: estimates were made without a machine and may be far off."""
        return max(60.0, 3 * self.seconds)
