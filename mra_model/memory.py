"""How much memory a model's weights need, and whether there is as much: asked before anything is allocated."""

import os
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, LlavaConfig
from transformers import initialization as init


class NotEnoughMemory(RuntimeError):
    """A model's weights do not fit into the memory that is available."""


def build_empty(config: LlavaConfig, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The model of `config` on `device` with unset parameters; on `meta` it takes no memory."""
    with torch.device(device), init.no_init_weights():
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def count_parameters(config: LlavaConfig) -> int:
    """Parameters of the model of `config`, counted on the `meta` device."""
    return sum(parameter.numel() for parameter in build_empty(config, torch.float32, "meta").parameters())


def available_memory(device: torch.device | str) -> int:
    """Bytes that can be allocated on `device` now.

    On a CPU that is what the kernel calls available, or all physical memory where it does not say, at most the
    container's limit.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_container_limit(), _kernel_estimate()]
    return min((limit for limit in limits if limit is not None), default=_physical_memory())


def require_memory(config: LlavaConfig, dtype: torch.dtype, device: torch.device | str) -> None:
    """Raises unless the weights of `config` in `dtype` fit on `device`.

    Raises:
        NotEnoughMemory: says how much is needed, how much there is, and what would help.
    """
    if torch.device(device).type == "meta":
        return
    count = count_parameters(config)
    needed, available = count * dtype.itemsize, available_memory(device)
    if needed <= available:
        return
    raise NotEnoughMemory(
        f"a model of {count / 1e9:.2f}e9 parameters needs {needed / 2**30:.1f} GiB in {dtype}, but {device} has "
        f"{available / 2**30:.1f} GiB; choose a smaller model, a narrower dtype such as torch.bfloat16, another "
        f"device, or device='meta' to look at its structure only"
    )


def _kernel_estimate() -> int | None:
    """MemAvailable of Linux: free memory and what caches would give back."""
    file = Path("/proc/meminfo")
    if not file.is_file():
        return None
    for line in file.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _container_limit() -> int | None:
    """The memory limit of this control group (version 2), where there is one."""
    file = Path("/sys/fs/cgroup/memory.max")
    text = file.read_text().strip() if file.is_file() else "max"
    return None if text == "max" else int(text)


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
