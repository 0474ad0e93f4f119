"""A step of a benchmark run: what it is called, how long it should take, and what it is given when it runs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# Variants that compute with kernels of this package; `fused, CUDA graph` is one of them too.
OURS = ("native", "triton", "fused", "optimized")

# How a failure begins that says nothing about the kernel: too little memory, or nothing to compare with.
_EXCUSES = ("NotEnoughMemory", "OutOfMemoryError", "not measured", "not checked")


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
        case: what is computed, and at which shape; one line for readers.
        variant: who computes it; the first variant of a case is its baseline.
        labels: the same for programs: suite, op, shape, batch, dtype, direction, side, ... as far as they apply.
        times: by condition. `warm` and `cold` are a kernel's times with inputs in the cache and out of it (on a GPU by
            graph replay); `call` is what a caller waits for one call, launch gaps included; `first token`,
            `10 tokens` and `64 tokens` are those of an answer.
        parts: medians in microseconds of the parts of a call, by name.
        errors: by output, |out - exact| / |exact| against the same computation in float64.
        bytes: that the case must move at least, each input read and each output written once.
        flops: that the case must do at least; a multiply-add counts two.
        memory: peak in bytes beyond what was allocated before the call; for whole models see `facts`.
        kernels: what ran, slowest first, the rest left out: name, calls, microseconds.
        launches: how many kernels ran.
        failure: why there are no times, or why they must not be trusted.
        facts: anything else worth keeping.
    """

    case: str
    variant: str
    labels: dict[str, str | int | bool] = field(default_factory=dict)
    times: dict[str, Times] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    bytes: int | None = None
    flops: int | None = None
    memory: int | None = None
    kernels: list[dict[str, Any]] = field(default_factory=list)
    launches: int | None = None
    failure: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_fault(self) -> bool:
        """Whether a kernel of this package is wrong or broken; a library that refuses a shape is only a finding."""
        ours = self.variant.split(",")[0] in OURS
        return ours and self.failure is not None and not self.failure.startswith(_EXCUSES)


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
        name: `suite/what/...`, for `--only`.
        about: one line for the list of steps.
        seconds: estimate by device type, on an H100 and on two cores; without an entry it does not run there.
        run: does it; must be picklable, because it travels to the worker.
    """

    name: str
    about: str
    seconds: dict[str, float]
    run: Callable[[Run], None]

    def limit(self, device: torch.device) -> float:
        """Seconds after which the step is stopped: machines differ, and an estimate may be far off."""
        return max(60.0, 3 * self.seconds[device.type])
