"""Wall-clock times of a model's parts, by hooks, and their medians."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from types import TracebackType
from typing import Any

import torch
from torch import nn

# The moment of a mark: seconds on a CPU, an event in the stream on a GPU.
Mark = float | torch.cuda.Event


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of some samples, in the samples' unit."""

    median: float
    p20: float
    p80: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def spread(samples: Sequence[float]) -> Spread:
    """samples: at least one; of a single one all three values are that one."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    cuts = quantiles(samples, n=5, method="inclusive")
    return Spread(median(samples), cuts[0], cuts[3])


def synchronize(device: torch.device) -> None:
    """Waits for the device's work; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PartTimer(AbstractContextManager["PartTimer"]):
    """Times groups of modules while it is entered.

    On a GPU the marks are events in the stream, read after one synchronization, so that timing does not keep the CPU
    from running ahead; a part's time then includes the gaps between its kernels.

    Args:
        parts: by name, the modules whose times add up. A module may be in one group only; a group may contain another.
        device: of the modules.
    """

    def __init__(self, parts: Mapping[str, Sequence[nn.Module]], device: torch.device) -> None:
        self._parts = parts
        self._device = device
        self._marks: dict[str, list[tuple[Mark, Mark]]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "PartTimer":
        for name, modules in self._parts.items():
            for module in modules:
                self._watch(name, module)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call, and starts again."""
        synchronize(self._device)
        times = {name: sum(_seconds(*pair) for pair in self._marks.get(name, [])) for name in self._parts}
        self._marks.clear()
        return times

    def _watch(self, name: str, module: nn.Module) -> None:
        begun: list[Mark] = []

        def begin(*_: Any) -> None:
            begun.append(self._mark())

        def end(*_: Any) -> None:
            self._marks.setdefault(name, []).append((begun.pop(), self._mark()))

        self._handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]

    def _mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _seconds(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    return begin.elapsed_time(end) / 1e3
