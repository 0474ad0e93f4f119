"""Running steps: in a worker process, most important first, within given minutes, into one results folder."""

import os
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench import machine
from bench.record import DONE, FAILED, NOT_MEASURED, Results, ResultsMismatch
from bench.stamp import RESULTS, Stamp
from bench.step import Result, Step
from bench.summary import line
from bench.worker import StepFailed, Worker
from mra_model.environment import busy_seconds

Say = Callable[[str], None]

# Beyond this share of the processor other programs make times unreliable.
BUSY_SHARE = 0.1

# The most that one step of a rehearsal may take.
REHEARSAL_SECONDS = 300.0

# Of a run that keeps nothing.
NOBODYS = Stamp("0" * 40, "0" * 40, True)


class CannotRun(RuntimeError):
    """The command cannot start; the message says what to do."""


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> a device of this machine.

    Raises:
        CannotRun: there is no GPU.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise CannotRun(
            f"PyTorch {torch.__version__} finds no CUDA device here. Run this on a machine with a GPU, "
            f"or rehearse it on a CPU with --dry-run"
        )
    return torch.device("cuda", torch.cuda.current_device())


def measure(
    steps: Sequence[Step],
    device: torch.device,
    stamp: Stamp,
    *,
    out: Path | None = None,
    minutes: float | None = None,
    force: bool = False,
    command: str,
    say: Say,
) -> bool:
    """Runs steps, most important first, and keeps every result in one folder.

    Args:
        steps: each with an estimate for the device.
        device: to measure on.
        stamp: the source that is measured.
        out: the folder; by default bench/results/<machine>/<date>-<commit>, or an earlier one of this commit.
        minutes: no step starts whose estimate does not fit into what is left of them, and none runs past them; None for
            no limit.
        force: repeat steps whose results are there.
        command: to keep with the results.
        say: prints a line.

    Returns:
        Whether no step failed.

    Raises:
        CannotRun: MRA_BACKEND is set, or the files differ from the commit.
        ResultsMismatch: the folder holds other results.
    """
    if stamp.dirty:
        raise CannotRun(
            "the files differ from the commit, so nobody could tell what was measured: commit them first, or try it "
            "out with --scratch, which keeps nothing"
        )
    _check_environment()
    deadline = _deadline(minutes)
    described = machine.describe(device)
    folder = out if out is not None else default_folder(described, stamp)
    results = Results(folder, stamp, described, command)
    say(f"results go to {folder}")
    return _run_all(steps, results, Worker(device, False, folder), deadline, force, say)


def try_out(steps: Sequence[Step], device: torch.device, *, minutes: float | None = None, say: Say) -> bool:
    """The same from whatever source is here, for a look: prints the results and keeps nothing."""
    _check_environment()
    deadline = _deadline(minutes)
    say("measures for real, and keeps nothing")
    with TemporaryDirectory() as name:
        results = Results(Path(name), NOBODYS, machine.describe(device), "scratch")
        return _run_all(steps, results, Worker(device, False, Path(name)), deadline, False, say)


def rehearse(steps: Sequence[Step], device_type: str, say: Say) -> bool:
    """Lists steps and runs each one's code on the CPU, with tiny shapes and once; keeps nothing.

    Args:
        steps: each with an estimate for the device type.
        device_type: `cpu` or `cuda`, where the steps are meant to run.
        say: prints a line.

    Returns:
        Whether no step failed.
    """
    width = max(len(step.name) for step in steps)
    say(f"steps, most important first, and their estimates on {device_type}:")
    for step in steps:
        say(f"  {step.name:{width}} {step.seconds[device_type]:6.0f} s  {step.about}")
    say(f"  {'together':{width}} {sum(step.seconds[device_type] for step in steps):6.0f} s")
    say("rehearsal on the CPU with tiny shapes; its times mean nothing:")
    device = torch.device("cpu")
    with TemporaryDirectory() as name:
        results = Results(Path(name), NOBODYS, machine.describe(device), "rehearsal")
        worker = Worker(device, True, Path(name))
        return _run_all(steps, results, worker, None, False, say)


def default_folder(described: dict[str, Any], stamp: Stamp) -> Path:
    """The machine's newest folder of this commit, or a new one of today.

    Args:
        described: from `machine.describe`.
        stamp: the source.
    """
    folder, commit = RESULTS / machine.folder_name(described), stamp.commit[:12]
    earlier = sorted(folder.glob(f"????-??-??-{commit}"))
    return earlier[-1] if earlier else folder / f"{datetime.now(UTC):%Y-%m-%d}-{commit}"


def _check_environment() -> None:
    backend = os.environ.get("MRA_BACKEND")
    if backend is not None:
        raise CannotRun(f"MRA_BACKEND={backend} would choose the backends that are to be compared: unset it")


def _deadline(minutes: float | None) -> float | None:
    return None if minutes is None else time.monotonic() + 60 * minutes


def _run_all(
    steps: Sequence[Step], results: Results, worker: Worker, deadline: float | None, force: bool, say: Say
) -> bool:
    """Runs what is not there yet and fits; whether no step failed."""
    try:
        for step in steps:
            left = float("inf") if deadline is None else deadline - time.monotonic()
            estimate = 0.0 if worker.rehearsal else step.seconds[worker.device.type]
            if results.is_done(step.name) and not force:
                say(f"{step.name}: its results are there already")
            elif estimate > left:
                say(f"{step.name}: not measured, {left:.0f} s are left and it takes about {estimate:.0f} s")
                results.end(step.name, NOT_MEASURED, why=f"{left:.0f} s were left, its estimate is {estimate:.0f} s")
            else:
                limit = REHEARSAL_SECONDS if worker.rehearsal else step.limit(worker.device)
                _run_one(step, min(limit, left), results, worker, say)
    finally:
        worker.stop()
    return _conclude(steps, results, say)


def _run_one(step: Step, limit: float, results: Results, worker: Worker, say: Say) -> None:
    say(f"{step.name}: {step.about}")
    results.begin(step.name)
    baselines: dict[str, dict[str, Any]] = {}
    faults: list[str] = []

    def record(result: Result) -> None:
        try:
            kept = results.add(step.name, result)
        except (ResultsMismatch, TypeError, ValueError) as error:
            raise StepFailed(f"{result.case}, {result.variant}: {error}") from error
        if result.is_fault:
            faults.append(f"{result.case}, {result.variant}: {result.failure}")
        baseline = baselines.setdefault(result.case, kept)
        if not worker.rehearsal or result.failure:
            say("  " + line(kept, baseline))

    watch = _Watch(worker.start())
    begin = time.monotonic()
    try:
        worker.run(step, limit, record)
        others = watch.others()
        state, why = (FAILED, "\n".join(faults)) if faults else (DONE, None)
    except StepFailed as error:
        others, state, why = None, FAILED, str(error)
    seconds = round(time.monotonic() - begin, 1)
    gpu = machine.gpu_state() if worker.device.type == "cuda" else None
    results.end(step.name, state, why=why, seconds=seconds, others=others, gpu=gpu)
    if state == FAILED:
        say(f"{step.name}: failed\n{why}")
        return
    count = sum(result["step"] == step.name for result in results.data["results"])
    say(f"{step.name}: done, {count} results, {seconds} s")
    if others is not None and others > BUSY_SHARE and not worker.rehearsal:
        say(f"  other programs used {others:.0%} of the processor: the times are unreliable")


class _Watch:
    """How much of the processor programs other than this one and its worker use, from its making on.

    Args:
        leader: the worker's process id.
    """

    def __init__(self, leader: int) -> None:
        self._leader = leader
        self._begin = self._used(), time.monotonic()

    def others(self) -> float | None:
        """A share; None where the system does not tell."""
        now, (begun, since) = self._used(), self._begin
        if now is None or begun is None:
            return None
        return round(max(0.0, now - begun) / ((time.monotonic() - since) * (os.cpu_count() or 1)), 3)

    def _used(self) -> float | None:
        busy = busy_seconds()
        return None if busy is None else busy - machine.session_seconds(self._leader) - time.process_time()


def _conclude(steps: Sequence[Step], results: Results, say: Say) -> bool:
    """Prints how each step ended; whether none failed."""
    ended = {step.name: results.data["steps"][step.name] for step in steps}
    width = max(len(name) for name in ended)
    for name, end in ended.items():
        say(f"{name:{width}} {end['state']:13} {end.get('seconds', '')}")
    say(f"together {sum(end.get('seconds', 0) for end in ended.values()):.0f} s")
    return all(end["state"] != FAILED for end in ended.values())
