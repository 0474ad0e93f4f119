"""What ran, and when: the slowest kernels of eager and fused, and both in one trace for https://ui.perfetto.dev.

The trace has no source lines, paths or names of the machine, only what this module copies into it.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench.compare import MOST_KERNELS
from bench.models import LLAVA_HR, Subject, choose, make_inputs
from bench.step import Result, Run
from bench.suites import train
from bench.timing import synchronize
from mra_kernels import use_backend
from mra_model.compare.measure import answer
from mra_model.memory import NotEnoughMemory

VARIANTS = {"eager": "reference", "fused": "auto"}

# Of an answer: the first one reads the whole prompt, the others are all alike.
TOKENS = 5

# In a trace, which then stays under about 10 MB; the longest are kept.
MOST_EVENTS = 400_000

# Of a trace's events, by the profiler's category: the CPU's side, and the device's.
_HOST = ("cpu_op", "cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
# The arrow from a launch to its kernel.
_FLOW = "ac2g"
_ARGUMENTS = ("Input Dims", "stream", "grid", "block", "registers per thread", "shared memory", "bytes")

Event = dict[str, Any]

# Does the profiled thing once with a backend.
Work = Callable[[str], Any]


def run(run: Run, *, what: str) -> None:
    """The slowest kernels of one call, and its trace in the run's folder.

    Args:
        run: of the step.
        what: `vision`, the tower's forward at 1024; `generate`, the start of an answer; or `train`, a step of stage 2
            with one sample. On a GPU around a language model of 7B, on a CPU around the small one.

    Raises:
        ValueError: no such thing.
    """
    if what not in _WORKS:
        raise ValueError(f"nothing is called {what!r}; there are {', '.join(_WORKS)}")
    # The tower alone is the same beside every language model.
    language = "7B" if run.device.type == "cuda" and what != "vision" else "small"
    subject = choose(run, LLAVA_HR, language, 1024)
    try:
        work = _WORKS[what](subject, run.device)
    except NotEnoughMemory as error:
        for variant in VARIANTS:
            run.record(_result(subject, what, variant, failure=f"NotEnoughMemory: {error}"))
        return
    traces: dict[str, list[Event]] = {}
    tables = {}
    for variant, backend in VARIANTS.items():
        # The first call still allocates and picks kernels.
        work(backend)
        traces[variant], tables[variant] = _profile(partial(work, backend), run.device)
    name = f"trace-{what}.json.gz"
    left_out = write_trace(run.folder / name, traces)
    for variant, table in tables.items():
        launches = sum(kernel["calls"] for kernel in table)
        facts: dict[str, Any] = {"trace": name} | ({"events left out": left_out} if left_out else {})
        run.record(_result(subject, what, variant, kernels=table[:MOST_KERNELS], launches=launches, facts=facts))


def write_trace(file: Path, traces: dict[str, list[Event]]) -> int:
    """Writes a gzipped trace in which every variant is a group of processes of its own, and all begin at zero.

    Args:
        file: to write.
        traces: by variant, the profiler's events.

    Returns:
        How many events were left out.
    """
    events = [event for number, of in enumerate(traces.items()) for event in _named(number, *of)]
    kept = events
    if len(events) > MOST_EVENTS:
        # What says where an event belongs stays; arrows and the shortest events go first.
        weight = {"M": float("inf"), "X": 0.0}
        kept = sorted(events, key=lambda event: -(weight.get(event["ph"], -1.0) + event.get("dur", 0.0)))[:MOST_EVENTS]
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": kept}, separators=(",", ":"))
    # Without the date, so that equal traces are equal files.
    file.write_bytes(gzip.compress(text.encode(), mtime=0))
    return len(events) - len(kept)


def _vision(subject: Subject, device: torch.device) -> Work:
    model = subject.build(device)
    tower, pixels = model.model.vision_tower, make_inputs(model.config, device)["pixel_values"]

    @torch.no_grad()
    def work(backend: str) -> None:
        with use_backend(backend):
            tower(pixels)

    return work


def _generate(subject: Subject, device: torch.device) -> Work:
    model = subject.build(device)
    inputs = make_inputs(model.config, device)

    def work(backend: str) -> None:
        with use_backend(backend):
            answer(model, inputs, TOKENS, {})

    return work


def _train(subject: Subject, device: torch.device) -> Work:
    model = train.prepare(subject, 2, device, checkpointing=False)
    inputs = train.make_batch(model, 2, 1, device)
    return lambda backend: train.step(model, inputs, backend)


_WORKS: dict[str, Callable[[Subject, torch.device], Work]] = {
    "vision": _vision,
    "generate": _generate,
    "train": _train,
}


def _profile(call: Callable[[], Any], device: torch.device) -> tuple[list[Event], list[dict[str, Any]]]:
    """The events of one call, and what it ran, slowest first: name, calls, microseconds."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True) as trace:
        call()
        synchronize(device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    table = [
        {
            "name": event.key[:160],
            "calls": event.count,
            "us": round(event.self_device_time_total if on_gpu else event.self_cpu_time_total, 1),
        }
        for event in trace.key_averages()
        if event.device_type == wanted
    ]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return events, sorted(table, key=lambda kernel: -kernel["us"])


def _named(number: int, variant: str, events: list[Event]) -> Iterator[Event]:
    """The events worth keeping, with processes and threads counted instead of the machine's own numbers.

    Args:
        number: of the variant.
        variant: its name, which its processes bear.
        events: as the profiler writes them.
    """
    kept = [event for event in events if event.get("cat") in (*_HOST, *_DEVICE, _FLOW) and event["ph"] in "Xsf"]
    begin = min((event["ts"] for event in kept), default=0.0)
    host = {event["pid"] for event in kept if event["cat"] in _HOST}
    processes: dict[Any, int] = {}
    threads: dict[Any, int] = {}
    for event in kept:
        pid, tid = event["pid"], event["tid"]
        if pid not in processes:
            processes[pid] = 100 * number + len(processes) + 1
            name = f"{variant}: {'CPU' if pid in host else f'GPU {pid}'}"
            yield {"ph": "M", "name": "process_name", "pid": processes[pid], "tid": 0, "args": {"name": name}}
        if (pid, tid) not in threads:
            threads[pid, tid] = len(threads) + 1
            name = f"{'thread' if pid in host else 'stream'} {threads[pid, tid]}"
            named = {"ph": "M", "name": "thread_name", "pid": processes[pid], "tid": threads[pid, tid]}
            yield named | {"args": {"name": name}}
        found: Event = {key: event[key] for key in ("ph", "cat", "name", "dur", "bp") if key in event}
        found |= {"pid": processes[pid], "tid": threads[pid, tid], "ts": round(event["ts"] - begin, 3)}
        arguments = {key: value for key, value in event.get("args", {}).items() if key in _ARGUMENTS}
        if arguments:
            found["args"] = arguments
        if "id" in event:
            # Of an arrow; the same number in another variant is another arrow.
            found["id"] = f"{number}.{event['id']}"
        yield found


def _result(subject: Subject, what: str, variant: str, **found: Any) -> Result:
    labels = {"suite": "profile", "what": what} | subject.labels()
    return Result(f"profile of {what}, {subject}", variant, labels, **found)
