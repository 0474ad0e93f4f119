"""Steps for the tests of the benchmarks' worker: functions of a module, so that they travel to another process."""

import os
import subprocess
import sys
import time
from pathlib import Path

from bench.step import Result, Run, Times

TIMES = Times(2.0, 1.0, 3.0, [1.0, 2.0, 3.0])


def record_two(run: Run) -> None:
    run.record(Result("case", "first", {"warm": TIMES}))
    run.record(Result("case", "second", {"warm": TIMES}))


def record_and_raise(run: Run) -> None:
    run.record(Result("case", "first", {"warm": TIMES}))
    raise ValueError("planted")


def record_and_die(run: Run) -> None:
    run.record(Result("case", "first", {"warm": TIMES}))
    os._exit(7)


def record_and_hang(run: Run, pid_file: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pid_file.write_text(str(child.pid))
    run.record(Result("case", "first", {"warm": TIMES}))
    time.sleep(600)
