"""What comes before any number: the package built on this machine, and its tests run on its device."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from bench.stamp import ROOT
from bench.step import Result, Run

# Editable, so that the extension lies in this checkout, which `python -m bench` imports; nothing is downloaded.
BUILD = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-v", "-e", "."]
TESTS = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-p", "no:cacheprovider", "--durations=20"]
# Most tests wait for their own launches, so several processes share the GPU where pytest-xdist is there.
PARALLEL = ["-n", "4"]
SHOW = [sys.executable, "-c", "import json, mra_kernels; print(json.dumps(mra_kernels.build_info()))"]

LABELS: dict[str, str | int | bool] = {"suite": "checks"}


def build(run: Run) -> None:
    """Builds with CUDA, failing where that is not possible; records what the extension says of itself."""
    if run.rehearsal:
        run.record(Result("build", "rehearsal", LABELS, facts={"would run": " ".join(BUILD)}))
        return
    _logged(BUILD, run.folder / "build.log", {"MRA_CUDA": "on"})
    shown = subprocess.run(SHOW, cwd=ROOT, capture_output=True, text=True, check=False)
    if shown.returncode != 0:
        raise RuntimeError(f"the built extension does not load: {shown.stderr.strip()}")
    run.record(Result("build", "extension", LABELS, facts=json.loads(shown.stdout)))


def tests(run: Run) -> None:
    """Runs the tests that need a GPU; records how many passed, and the names of those that did not."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        parallel = PARALLEL if find_spec("xdist") and not run.rehearsal else []
        command = [*TESTS, *parallel, f"--junitxml={report}"]
        # The libraries' TF32 would be taken for PyTorch's error in float32.
        code = _logged(command, run.folder / "tests.log", {"NVIDIA_TF32_OVERRIDE": "0"}, check=False)
        counts, failed = _read(report)
    run.record(Result("tests", "on the device", LABELS, facts=counts | {"failed": failed}))
    # Without a GPU every test is skipped.
    if code != 0 or (counts["passed"] == 0 and not run.rehearsal):
        raise RuntimeError(f"pytest ended with {code}: {counts}, failed: {failed}; see tests.log")


def _read(report: Path) -> tuple[dict[str, int], list[str]]:
    """Counts, and the names of the tests that failed, from pytest's XML report."""
    counts = {"passed": 0, "skipped": 0}
    failed = []
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    return counts, failed


def _logged(command: list[str], log: Path, environment: dict[str, str], check: bool = True) -> int:
    """Runs a command at the repository's root into a log; its exit code.

    Raises:
        RuntimeError: it failed, and `check` is on.
    """
    with log.open("w") as file:
        print("$", " ".join(command), file=file, flush=True)
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if check and done.returncode != 0:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}; the end of {log.name}:\n{end}")
    return done.returncode
