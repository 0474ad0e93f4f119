"""What the numbers depend on: hardware, driver, versions, clocks. Read only; no setting of a GPU is ever changed."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mra_model import environment

# Beyond those of `environment.PACKAGES`.
_PACKAGES = ("nvidia-cudnn-cu13", "nvidia-cublas")

# The commit says which; it may be built after this is asked.
_MEASURED = "mra-kernels"

_STATE = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu", "pstate")


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, for the head of a results file. No host name, no user, no paths.

    `keeps_freed_memory` says whether the processes that measure on a CPU can tell glibc to keep what is freed, as they
    do before anything else; this process is told so, too.
    """
    on_gpu = device.type == "cuda"
    versions = environment.versions() | {name: _version(name) for name in _PACKAGES}
    return {
        "device": environment.device_name(device),
        "type": device.type,
        "cpu": environment.hardware()["cpu"] | {"last_level_cache_bytes": environment.last_level_cache()},
        "gpu": _gpu(device) if on_gpu else None,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": platform.platform(),
        "release": _release(),
        "allocator": {
            "name": " ".join(platform.libc_ver()).strip() or None,
            "keeps_freed_memory": not on_gpu and environment.keep_freed_memory(),
        },
        "versions": {name: value for name, value in versions.items() if name != _MEASURED},
    }


def folder_name(machine: dict[str, Any]) -> str:
    """What `describe` gave -> the machine's folder: `nvidia-h200`, `amd-epyc-2-cores`."""
    name = machine["device"]
    if machine["type"] == "cpu":
        name += f" {machine['cpu']['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


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


def session_seconds(leader: int) -> float:
    """CPU seconds that the processes of a session have used, with those of their children that have ended.

    Args:
        leader: its process id.
    """
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name before the parenthesis may have spaces. Then come state, parent, group, session, ...
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            # It ended since the folder was listed.
            continue
        if int(fields[3]) == leader:
            # utime, stime, and both of the children that were waited for.
            ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    index = device.index if device.index is not None else torch.cuda.current_device()
    return environment.gpus()[index] | {
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "state_at_start": gpu_state(),
    }


def _release() -> str | None:
    """The system's name for itself: `Debian GNU/Linux 12 (bookworm)`."""
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
