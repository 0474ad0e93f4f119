"""Timing: warm-up, variants in turns, warm and cold caches, whole calls, and the names of the kernels that ran.

On a GPU by CUDA events and graph replays, on a CPU by the clock.
"""

import time
from collections.abc import Callable, Mapping
from functools import cache
from statistics import median, quantiles
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.step import Times
from mra_model.environment import last_level_cache
from mra_model.timing import synchronize

Call = Callable[[], Any]

# A kernel is repeated in a row until the row lasts this long, so that launching it or reading the clock weighs nothing.
ROW_SECONDS = 300e-6
MAX_REPEATS = 32

# At least and at most.
ROUNDS = (7, 50)

# Where the least number of rounds would last this many times longer than wanted, there are fewer, but `FEWEST`.
PATIENCE = 10.0
FEWEST = 3

# Beyond this a call needs no second one to know how long it takes.
LONG = 0.25


def summarize(samples: list[float]) -> Times:
    """samples: microseconds, at least one."""
    rounded = [round(sample, 3) for sample in samples]
    if len(rounded) == 1:
        return Times(rounded[0], rounded[0], rounded[0], rounded)
    cuts = quantiles(rounded, n=5, method="inclusive")
    return Times(round(median(rounded), 3), round(cuts[0], 3), round(cuts[3], 3), rounded)


def kernel_times(
    calls: Mapping[str, Call], device: torch.device, seconds: float = 0.6, once: bool = False
) -> dict[str, dict[str, Times]]:
    """The time of each call alone, the variants taking turns; on a GPU without launch gaps, by replays of a CUDA graph.

    Args:
        calls: by variant; each is warmed up first. On a GPU it must be capturable.
        device: that the calls compute on.
        seconds: to spend on all of them, roughly, warm and cold each.
        once: one round, to show that it runs; its times mean nothing.

    Returns:
        By variant, `warm`: one call in a row of the same, the cache as the last one left it; `cold`: one call after its
        inputs were evicted from the L2, or from the CPU's last-level cache. A cold time on a GPU includes launching a
        graph of one call, a few microseconds, which `launch_floor` measures. On a CPU whose system does not tell the
        size of its cache there is no `cold`.
    """
    estimates = {name: LONG if once else _estimate(call, device) for name, call in calls.items()}
    repeats = {name: min(MAX_REPEATS, max(1, round(ROW_SECONDS / t))) for name, t in estimates.items()}
    make = capture if device.type == "cuda" else _row
    singles = {name: make(call, 1) for name, call in calls.items()}
    rows = {name: make(call, repeats[name]) for name, call in calls.items()}
    rounds = 1 if once else _rounds(seconds, sum(repeats[name] * t for name, t in estimates.items()))
    warm = _interleave(rows, rounds, device)
    times = {name: {"warm": summarize([sample / repeats[name] for sample in warm[name]])} for name in calls}
    flush = _flusher(device, once)
    if flush is not None:
        flushes = 0.0 if once else len(calls) * _estimate(flush, device)
        rounds = 1 if once else _rounds(seconds, sum(estimates.values()) + flushes)
        for name, samples in _interleave(singles, rounds, device, flush).items():
            times[name]["cold"] = summarize(samples)
    return times


def call_times(
    calls: Mapping[str, Call], device: torch.device, seconds: float = 2.0, once: bool = False
) -> dict[str, dict[str, Times]]:
    """What a caller waits for one call, from an idle device to the end of its work: launch gaps count.

    Args:
        calls, device, seconds, once: see `kernel_times`.

    Returns:
        By variant, `call`. The variants take turns.
    """
    rounds = 1 if once else _rounds(seconds, sum(_estimate(call, device) for call in calls.values()))
    samples = _interleave(calls, rounds, device, idle=True)
    return {name: {"call": summarize(samples[name])} for name in calls}


def launch_floor(device: torch.device) -> dict[str, dict[str, Times]]:
    """The time of a kernel that does almost nothing: what launching costs inside `warm` and `cold` times."""
    tiny = torch.randn(32, device=device)
    return kernel_times({"one tiny kernel": tiny.neg}, device, seconds=0.1)


def capture(call: Call, repeats: int = 1) -> Call:
    """A CUDA graph of `repeats` calls, as a call that replays it and returns the last one's outputs.

    The call is warmed up on a side stream first, as capture requires.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            outputs = call()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def replayed(call: Call) -> Call:
    """The same call as a CUDA graph, captured when it is first wanted."""
    graph = cache(lambda: capture(call))
    return lambda: graph()()


def kernel_names(call: Call, device: torch.device) -> list[dict[str, Any]]:
    """The kernels that one call runs (on a CPU, PyTorch's operators), slowest first: name, calls, microseconds."""
    on_gpu = device.type == "cuda"
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        call()
        synchronize(device)
    found = [
        {
            "name": event.key[:160],
            "calls": event.count,
            "us": round(event.self_device_time_total if on_gpu else event.self_cpu_time_total, 1),
        }
        for event in trace.key_averages()
        if event.device_type == wanted
    ]
    return sorted(found, key=lambda kernel: -kernel["us"])


def _row(call: Call, repeats: int) -> Call:
    """`repeats` calls as one."""
    if repeats == 1:
        return call

    def row() -> None:
        for _ in range(repeats):
            call()

    return row


def _interleave(
    calls: Mapping[str, Call], rounds: int, device: torch.device, before: Call | None = None, idle: bool = False
) -> dict[str, list[float]]:
    """Microseconds of each call in each round; `before` runs ahead of each, untimed."""
    names = list(calls)
    samples: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    timed = _by_events if device.type == "cuda" else _by_clock
    for index in range(rounds):
        # Each round starts with another variant, so that none always follows the same one.
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            if before is not None:
                before()
            if idle:
                synchronize(device)
            samples[name].append(timed(calls[name]))
    synchronize(device)
    return {name: [read() for read in of] for name, of in samples.items()}


def _by_events(call: Call) -> Callable[[], float]:
    """Its microseconds on the GPU, to be read after a synchronization."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    return lambda: 1e3 * start.elapsed_time(end)


def _by_clock(call: Call) -> Callable[[], float]:
    begin = time.perf_counter()
    call()
    passed = 1e6 * (time.perf_counter() - begin)
    return lambda: passed


def _estimate(call: Call, device: torch.device) -> float:
    """Seconds of one call, after at least 30 ms of the same, which also brings the clocks up."""
    begin = time.perf_counter()
    call()
    synchronize(device)
    first = time.perf_counter() - begin
    if first > LONG:
        return first
    begin, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - begin < 0.03:
        call()
        count += 1
        synchronize(device)
    return (time.perf_counter() - begin) / count


def _rounds(seconds: float, one: float) -> int:
    """How many rounds to make.

    Args:
        seconds: that they should take.
        one: seconds of one round.
    """
    low, high = ROUNDS
    low = min(low, max(FEWEST, int(PATIENCE * seconds / one)))
    return min(high, max(low, round(seconds / one)))


def _flusher(device: torch.device, tiny: bool = False) -> Call | None:
    """Reads four times the cache, so that inputs leave it and no written line is left to be stored in a timed region.

    On a GPU that is the L2, on a CPU the last level's. None where its size is unknown. `tiny` reads almost nothing.
    """
    on_gpu = device.type == "cuda"
    size = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else last_level_cache()
    if size is None:
        return None
    # Four bytes each; written once, since pages that never were are all the same one.
    buffer = torch.ones(1 if tiny else size, device=device)
    return buffer.sum
