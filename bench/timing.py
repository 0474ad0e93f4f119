"""Timing: CUDA events, warm-up, variants interleaved, warm and cold L2, and the names of the kernels that ran.

On a CPU, which only rehearses, each variant runs once against the wall clock.
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

Call = Callable[[], Any]

# A graph repeats a kernel until it lasts this long, so that launching the graph weighs nothing.
GRAPH_SECONDS = 300e-6
MAX_REPEATS = 32
ROUNDS = (7, 50)


def summarize(samples: list[float]) -> Times:
    """samples: microseconds, at least one."""
    rounded = [round(sample, 3) for sample in samples]
    if len(rounded) == 1:
        return Times(rounded[0], rounded[0], rounded[0], rounded)
    cuts = quantiles(rounded, n=5, method="inclusive")
    return Times(round(median(rounded), 3), round(cuts[0], 3), round(cuts[3], 3), rounded)


def kernel_times(calls: Mapping[str, Call], device: torch.device, seconds: float = 0.6) -> dict[str, dict[str, Times]]:
    """GPU time of each call without its launch gaps: replays of a CUDA graph, the variants taking turns.

    Args:
        calls: by variant; each must be capturable and is warmed up first.
        seconds: to spend on all of them, roughly.

    Returns:
        By variant, `warm`: one call in a row of the same, the L2 as the last one left it; `cold`: one call after its
        inputs were evicted from L2. A cold time includes launching a graph of one call, a few microseconds, which
        `launch_floor` measures.
    """
    if device.type == "cpu":
        return {name: {"warm": _wall(call), "cold": _wall(call)} for name, call in calls.items()}
    estimates = {name: _estimate(call) for name, call in calls.items()}
    repeats = {name: min(MAX_REPEATS, max(1, round(GRAPH_SECONDS / t))) for name, t in estimates.items()}
    singles = {name: capture(call) for name, call in calls.items()}
    rows = {name: capture(call, repeats[name]) for name, call in calls.items()}
    flush = _flusher(device)
    rounds = _rounds(seconds, sum((repeats[name] + 1) * t for name, t in estimates.items()))
    warm = _interleave(rows, rounds, None)
    cold = _interleave(singles, rounds, flush)
    return {
        name: {
            "warm": summarize([sample / repeats[name] for sample in warm[name]]),
            "cold": summarize(cold[name]),
        }
        for name in calls
    }


def call_times(calls: Mapping[str, Call], device: torch.device, seconds: float = 2.0) -> dict[str, dict[str, Times]]:
    """What a caller waits for one call, from an idle GPU to the end of its work: launch gaps count.

    Returns:
        By variant, `call`. The variants take turns.
    """
    if device.type == "cpu":
        return {name: {"call": _wall(call)} for name, call in calls.items()}
    estimates = {name: _estimate(call) for name, call in calls.items()}
    samples = _interleave(calls, _rounds(seconds, sum(estimates.values())), None, idle=True)
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


def synchronize(device: torch.device) -> None:
    """Waits for the device's work; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _interleave(
    calls: Mapping[str, Call], rounds: int, before: Call | None, idle: bool = False
) -> dict[str, list[float]]:
    """Microseconds of each call in each round; `before` runs ahead of each, untimed."""
    names = list(calls)
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in names}
    for index in range(rounds):
        # Each round starts with another variant, so that none always follows the same one.
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if before is not None:
                before()
            if idle:
                torch.cuda.synchronize()
            start.record()
            calls[name]()
            end.record()
            pairs[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [1e3 * start.elapsed_time(end) for start, end in of] for name, of in pairs.items()}


def _estimate(call: Call) -> float:
    """Seconds of one call, after at least 30 ms of the same, which also brings the clocks up."""
    call()
    torch.cuda.synchronize()
    begin, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - begin < 0.03:
        call()
        count += 1
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count


def _rounds(seconds: float, one: float) -> int:
    low, high = ROUNDS
    return min(high, max(low, round(seconds / one)))


def _flusher(device: torch.device) -> Call:
    """Reads four times the L2, so that inputs leave it and no written line is left to be stored in a timed region."""
    size = torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.randn(size, device=device)
    return buffer.sum


def _wall(call: Call) -> Times:
    begin = time.perf_counter()
    call()
    return summarize([1e6 * (time.perf_counter() - begin)])
