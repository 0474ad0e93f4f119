"""Steps run in a worker process: what crashes, hangs or spoils the GPU's context ends there, and the rest goes on."""

import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from bench.step import Result, Run, Step


class StepFailed(RuntimeError):
    """A step raised, took too long, or took its process down; the message says which."""


class Worker:
    """One process that runs steps until one of them fails; then the next step gets a new process.

    Args:
        device, rehearsal, folder: see `Run`.
    """

    def __init__(self, device: torch.device, rehearsal: bool, folder: Path) -> None:
        self.device, self.rehearsal = device, rehearsal
        self._settings = (device, rehearsal, folder)
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def run(self, step: Step, limit: float, record: Callable[[Result], None]) -> None:
        """Runs a step, handing on each result as it comes.

        Raises:
            StepFailed: with the traceback, the exit code, or the limit in seconds.
        """
        pipe = self._start()
        deadline = time.monotonic() + limit
        try:
            pipe.send(step)
            while True:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise StepFailed(f"stopped after {limit:.0f} s, its limit")
                message = pipe.recv()
                if isinstance(message, Result):
                    record(message)
                elif message is None:
                    return
                else:
                    raise StepFailed(message)
        except (EOFError, OSError):
            raise StepFailed(f"its process ended with exit code {self._exit_code()}") from None
        except StepFailed:
            self.stop()
            raise

    def start(self) -> int:
        """Starts the process where none is running; its id, which is its session's too."""
        self._start()
        if self._process is None or self._process.pid is None:
            raise RuntimeError("the worker process has no id")
        return self._process.pid

    def stop(self) -> None:
        """Ends the process and everything that it started."""
        if self._process is not None and self._process.pid is not None and self._process.is_alive():
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.join()
        self._process = self._pipe = None

    def _start(self) -> Connection:
        if self._pipe is not None:
            return self._pipe
        # A forked process could not use CUDA.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, *self._settings))
        self._process.start()
        theirs.close()
        # It leads a process group of its own before it is given work, so that `stop` can end the group.
        self._pipe.recv()
        return self._pipe

    def _exit_code(self) -> int | None:
        process, self._process, self._pipe = self._process, None, None
        if process is None:
            return None
        process.join()
        return process.exitcode


def _work(pipe: Connection, device: torch.device, rehearsal: bool, folder: Path) -> None:
    """The worker's side: steps come in; results go out, then None, or the traceback of what a step raised."""
    os.setsid()
    if device.type == "cpu":
        # Imported here, because on a GPU the first step builds what this imports.
        from mra_model.environment import keep_freed_memory

        # For all variants alike: else one faults pages in again that another left behind.
        keep_freed_memory()
    pipe.send(None)
    run = Run(device, rehearsal, folder, pipe.send)
    while True:
        try:
            step = pipe.recv()
        except EOFError:
            return
        try:
            step.run(run)
            if device.type == "cuda":
                # An error of the GPU that nobody has met yet belongs to this step, not to the next one.
                torch.cuda.synchronize(device)
        except Exception:
            pipe.send(_traceback())
        else:
            pipe.send(None)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _traceback() -> str:
    """Of the exception at hand, without the machine's folders, since it is kept with the results."""
    text = traceback.format_exc()
    for folder in (Path(__file__).resolve().parents[1], sys.prefix, sys.base_prefix):
        text = text.replace(f"{folder}{os.sep}", "")
    return text
