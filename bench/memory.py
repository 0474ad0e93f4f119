"""How much memory a call needs beyond what was allocated before it."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes that a call holds at once beyond its inputs, its outputs included; call it once before.

    On a GPU as PyTorch's allocator counts them. On a CPU by the resident set's high-water mark, after the allocator
    gave back what it had kept; buffers that a library or a kernel keeps from an earlier call count as inputs, and the
    mark's resolution is some hundred KiB. None where the system keeps no such mark or the allocator cannot be asked.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _give_back():
        return None
    try:
        # Lowers the high-water mark to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    resident = _status("VmRSS")
    call()
    high = _status("VmHWM")
    return None if resident is None or high is None else max(0, high - resident)


def _give_back() -> bool:
    """Makes glibc's allocator return freed memory to the system; False where there is another allocator."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return False
    trim(0)
    return True


def _status(key: str) -> int | None:
    """A size from /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None
