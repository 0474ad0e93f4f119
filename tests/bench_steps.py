"""Steps for the tests of the benchmarks' worker: functions of a module, so that they travel to another process."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.record import Results
from bench.stamp import Stamp
from bench.step import Result, Run, Step, Times

TIMES = Times(2.0, 1.0, 3.0, [1.0, 2.0, 3.0])

STAMP = Stamp("c" * 40, "d" * 40, False)

MACHINE = {
    "device": "a device",
    "type": "cpu",
    "cpu": {"name": "a cpu", "cores": 2, "threads": 2, "instruction_sets": ["avx2"], "last_level_cache_bytes": None},
    "gpu": None,
    "memory_bytes": 1 << 30,
    "system": "Linux",
    "release": None,
    "allocator": {"name": "glibc", "keeps_freed_memory": True},
    "versions": {"torch": "2.13", "triton": None},
}


def step(name: str, run: Any, seconds: float = 1.0) -> Step:
    """One that runs on both kinds of device."""
    return Step(name, "", {"cpu": seconds, "cuda": seconds}, run)


def open_results(folder: Path, stamp: Stamp = STAMP, **machine: Any) -> Results:
    return Results(folder, stamp, MACHINE | machine, "a command")


def record_two(run: Run) -> None:
    run.record(Result("case", "first", times={"warm": TIMES}))
    run.record(Result("case", "second", times={"warm": TIMES}))


def record_and_raise(run: Run) -> None:
    run.record(Result("case", "first", times={"warm": TIMES}))
    raise ValueError("planted")


def record_and_die(run: Run) -> None:
    run.record(Result("case", "first", times={"warm": TIMES}))
    os._exit(7)


def record_and_hang(run: Run, pid_file: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pid_file.write_text(str(child.pid))
    run.record(Result("case", "first", times={"warm": TIMES}))
    time.sleep(600)


def record_what_json_cannot(run: Run) -> None:
    run.record(Result("case", "first", facts={"dtype": torch.float32}))


def record_an_unknown_direction(run: Run) -> None:
    run.record(Result("case", "first", {"direction": "sideways"}, {"warm": TIMES}))


def record_failures(run: Run, variants: dict[str, str]) -> None:
    """By variant, its failure."""
    for variant, failure in variants.items():
        run.record(Result("case", variant, failure=failure))


def burn(run: Run, seconds: float) -> None:
    """Keeps one core busy, in a child of the worker."""
    code = f"import time; end = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    run.record(Result("case", "busy", facts={"threads": torch.get_num_threads()}))


def measure_a_wrong_kernel(run: Run) -> None:
    """The kernel benchmark of an op whose native kernel is 5% off, at tiny shapes."""
    from bench.suites import kernels
    from mra_kernels.dispatch import Backend
    from mra_kernels.ops import OPS

    backends = OPS["gated_resample_add"].backends
    right = backends["native"]
    assert isinstance(right, Backend)
    backends["native"] = replace(right, forward=lambda *arguments: 1.05 * right.forward(*arguments))
    kernels.run(replace(run, rehearsal=True), op="gated_resample_add", batch=1, dtype="float32")
