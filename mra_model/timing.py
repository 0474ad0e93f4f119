"""Wall-clock times of a model's parts, by hooks, and their medians."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median, quantiles
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


@contextmanager
def timed_parts(
    parts: Mapping[str, Sequence[nn.Module]], device: torch.device
) -> Iterator[Callable[[], dict[str, float]]]:
    """Times groups of modules inside the block.

    On a GPU the marks are events in the stream, read after one synchronization, so that timing does not keep the CPU
    from running ahead; a part's time then includes the gaps between its kernels.

    Args:
        parts: by name, the modules whose times add up. A group may contain another.
        device: of the modules.

    Yields:
        A function that gives the seconds of each part since its last call.
    """
    marks: dict[str, list[tuple[Mark, Mark]]] = {name: [] for name in parts}
    handles: list[Any] = []

    def watch(name: str, module: nn.Module) -> None:
        begun: list[Mark] = []

        def begin(*_: Any) -> None:
            begun.append(_mark(device))

        def end(*_: Any) -> None:
            marks[name].append((begun.pop(), _mark(device)))

        handles.extend([module.register_forward_pre_hook(begin), module.register_forward_hook(end)])

    def take() -> dict[str, float]:
        synchronize(device)
        times = {name: sum(_seconds(*pair) for pair in pairs) for name, pairs in marks.items()}
        for pairs in marks.values():
            pairs.clear()
        return times

    for name, modules in parts.items():
        for module in modules:
            watch(name, module)
    try:
        yield take
    finally:
        for handle in handles:
            handle.remove()


def _mark(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(begin: Mark, end: Mark) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1e3
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    raise TypeError(f"marks of different kinds: {type(begin).__name__} and {type(end).__name__}")
