"""Peak memory of one answer's start, measured in a process of its own, so that nothing else counts."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mra_model.compare.measure import Way, answer, optimized
from mra_model.compare.subject import Options, prepare

_PROGRAM = "from mra_model.compare.peak import main; main()"


@dataclass(frozen=True)
class Peak:
    """Bytes, or why they were not measured.

    Attributes:
        peak: on a CPU the process's largest resident set while it computes, libraries and weights included; on a GPU
            the most that PyTorch had allocated.
        weights: of the parameters alone.
        problem: why `peak` and `weights` are None.
    """

    peak: int | None
    weights: int | None
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure_peak(options: Options, way: Way) -> Peak:
    """Runs the picture, the prompt and two tokens in a new process; a failure there is a result, not an error."""
    mode = "plain" if way.optimizer is None else "optimized"
    command = [sys.executable, "-c", _PROGRAM, options.to_json(), way.backend, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        return Peak(None, None, f"the process was ended by signal {-done.returncode}; 9 means out of memory")
    if done.returncode > 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return Peak(None, None, f"the process failed: {lines[-1]}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """The new process: prints a `Peak` as JSON. Arguments: options as JSON, the backend, "optimized" or "plain"."""
    options = Options.from_json(sys.argv[1])
    way = Way(sys.argv[2], optimized if sys.argv[3] == "optimized" else None)
    subject = prepare(options)
    model = subject.build()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    on_gpu = subject.device.type == "cuda"
    try:
        _restart_gpu(subject.device) if on_gpu else _restart_cpu()
    except OSError as error:
        print(json.dumps(Peak(None, None, f"the system keeps no high-water mark: {error}").as_dict()))
        return
    with way.on(model):
        answer(model, subject.inputs, 2, {})
    peak = torch.cuda.max_memory_allocated(subject.device) if on_gpu else _high_water()
    print(json.dumps(Peak(peak, weights).as_dict()))


def _restart_gpu(device: torch.device) -> None:
    torch.cuda.reset_peak_memory_stats(device)


def _restart_cpu() -> None:
    """Lowers the high-water mark to what is resident now: building the model may have used more."""
    Path("/proc/self/clear_refs").write_text("5")


def _high_water() -> int:
    """The resident set's high-water mark in bytes.

    Not `resource.getrusage`, whose mark a process inherits from the one that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")
