"""`python -m bench gpu`: build, test and measure on a machine with a GPU and no network, within given minutes."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench import machine
from bench.plan import STEPS
from bench.record import DONE, FAILED, NOT_MEASURED, Results
from bench.stamp import ROOT, Stamp
from bench.step import Result, Step
from bench.summary import line
from bench.worker import StepFailed, Worker

Say = Callable[[str], None]


class CannotRun(RuntimeError):
    """The command cannot start; the message says what to do."""


def measure(
    stamp: Stamp, minutes: float, out: Path | None, only: Sequence[str], force: bool, command: str, say: Say
) -> bool:
    """Runs the steps on this machine's GPU, most important first, and keeps every result in one folder.

    Args:
        stamp: the source that is measured.
        minutes: no step starts whose estimate does not fit into what is left of them, and none runs past them.
        out: the folder; by default bench/results/<device>/<date>-<commit>.
        only: names of steps; empty for all.
        force: repeat steps whose results are there.
        command: to keep with the results.
        say: prints a line.

    Returns:
        Whether no step failed.

    Raises:
        CannotRun: there is no GPU, or an unknown step.
    """
    deadline = time.monotonic() + 60 * minutes
    if not torch.cuda.is_available():
        raise CannotRun(
            f"PyTorch {torch.__version__} finds no CUDA device here. Run this on a machine with a GPU, "
            f"or rehearse it on a CPU with --dry-run"
        )
    steps = _selected(only)
    device = torch.device("cuda", torch.cuda.current_device())
    folder = out if out is not None else _default_folder(device, stamp)
    results = Results(folder, stamp, machine.describe(device), command)
    say(f"results go to {folder}")
    worker = Worker(device, False, folder)
    try:
        _run_all(steps, results, worker, deadline, force, say)
    finally:
        worker.stop()
    return _conclude(results, say)


def rehearse(stamp: Stamp, only: Sequence[str], say: Say) -> bool:
    """Lists the steps and runs each one's code on the CPU, with tiny shapes and once; writes nothing that stays.

    Returns:
        Whether no step failed.

    Raises:
        CannotRun: an unknown step.
    """
    steps = _selected(only)
    say("steps, most important first, and their estimates on a GPU:")
    for step in steps:
        say(f"  {step.name:16} {step.seconds:5.0f} s  {step.about}")
    say(f"  {'together':16} {sum(step.seconds for step in steps):5.0f} s")
    say("rehearsal on the CPU with tiny shapes; its times mean nothing:")
    device = torch.device("cpu")
    with TemporaryDirectory() as name:
        results = Results(Path(name), stamp, machine.describe(device), "rehearsal")
        worker = Worker(device, True, Path(name))
        try:
            _run_all(steps, results, worker, time.monotonic() + 3600, False, say)
        finally:
            worker.stop()
        return _conclude(results, say)


def _selected(only: Sequence[str]) -> list[Step]:
    names = [step.name for step in STEPS]
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise CannotRun(f"no step is called {', '.join(unknown)}; there are {', '.join(names)}")
    return [step for step in STEPS if not only or step.name in only]


def _run_all(steps: Sequence[Step], results: Results, worker: Worker, deadline: float, force: bool, say: Say) -> None:
    for step in steps:
        left = deadline - time.monotonic()
        if results.is_done(step.name) and not force:
            say(f"{step.name}: its results are there already")
        elif step.seconds > left:
            say(f"{step.name}: not measured, {left:.0f} s are left and it takes about {step.seconds:.0f} s")
            results.end(step.name, NOT_MEASURED, why=f"{left:.0f} s were left, its estimate is {step.seconds:.0f} s")
        else:
            _run_one(step, min(step.limit, left), results, worker, say)


def _run_one(step: Step, limit: float, results: Results, worker: Worker, say: Say) -> None:
    say(f"{step.name}: {step.about}")
    results.begin(step.name)
    baselines: dict[str, dict[str, Any]] = {}

    def record(result: Result) -> None:
        kept = results.add(step.name, result)
        baseline = baselines.setdefault(result.case, kept)
        if not worker.rehearsal or result.failure:
            say("  " + line(kept, baseline))

    begin = time.monotonic()
    try:
        worker.run(step, limit, record)
        state, why = DONE, None
    except StepFailed as error:
        state, why = FAILED, str(error)
        say(f"{step.name}: failed\n{why}")
    seconds = round(time.monotonic() - begin, 1)
    results.end(step.name, state, why=why, seconds=seconds, gpu=machine.gpu_state())
    if state == DONE:
        count = sum(result["step"] == step.name for result in results.data["results"])
        say(f"{step.name}: done, {count} results, {seconds} s")


def _conclude(results: Results, say: Say) -> bool:
    """Prints how each step ended; whether none failed."""
    steps = results.data["steps"]
    for name, step in steps.items():
        say(f"{name:16} {step['state']:13} {step.get('seconds', '')}")
    say(f"together {sum(step.get('seconds', 0) for step in steps.values()):.0f} s")
    return all(step["state"] != FAILED for step in steps.values())


def _default_folder(device: torch.device, stamp: Stamp) -> Path:
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return ROOT / "bench" / "results" / machine.folder_name(device) / f"{date}-{stamp.commit[:12]}"
