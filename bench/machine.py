"""What the numbers depend on: hardware, driver, versions, clocks. Read only; no setting of a GPU is ever changed."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("triton", "transformers", "numpy", "nvidia-cudnn-cu13", "nvidia-cublas")
_STATE = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu", "pstate")


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, for the head of a results file."""
    return {
        "device": device_name(device),
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "cpu": {"name": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        }
        | {name: _version(name) for name in _PACKAGES},
    }


def device_name(device: torch.device) -> str:
    """`NVIDIA H200`, or the processor's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def folder_name(device: torch.device) -> str:
    """The device's name as a folder: `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def gpu_state() -> dict[str, str]:
    """Clocks in MHz, power in W, temperature in C, as nvidia-smi reads them now; or why it cannot."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(_STATE)}", "--format=csv,noheader,nounits", "--id=0"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"unknown": f"nvidia-smi: {error}"}
    return dict(zip(_STATE, (value.strip() for value in done.stdout.split(",")), strict=False))


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": _driver(),
        "state_at_start": gpu_state(),
    }


def _driver() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: nvidia-smi: {error}"
    return done.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
