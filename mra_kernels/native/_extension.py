"""The compiled extension, or the reason why it is not there: absent and broken are different things."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _load() -> tuple[Any, str | None]:
    """The extension and None, or None and why it is not loaded."""
    if find_spec("mra_kernels._C") is None:
        return None, "the compiled extension is absent: build it with pip install ."
    try:
        # After torch, so that both share one OpenMP runtime and its threads.
        return import_module("mra_kernels._C"), None
    except ImportError as error:
        return None, f"the compiled extension is broken ({error}); rebuild it with pip install --force-reinstall ."


extension, PROBLEM = _load()
HAS_CUDA = extension is not None and bool(extension.build_info()["cuda"])


def unsupported(
    device: torch.device, dtype: torch.dtype, dtypes: Sequence[torch.dtype], cuda_dtypes: Sequence[torch.dtype] = ()
) -> str | None:
    """None when the extension has a kernel for this device and dtype, otherwise the reason why not.

    Args:
        dtypes: what the op's CPU kernel takes.
        cuda_dtypes: what its CUDA kernel takes; none where there is no CUDA kernel.
    """
    if PROBLEM is not None:
        return PROBLEM
    if device.type == "cuda":
        if not cuda_dtypes:
            return "no native CUDA kernel yet"
        if not HAS_CUDA:
            return "the extension was built without CUDA: rebuild with MRA_CUDA=on pip install ."
    elif device.type != "cpu":
        return f"no native kernels for device type {device.type}"
    served = cuda_dtypes if device.type == "cuda" else dtypes
    if dtype not in served:
        names = ", ".join([str(d).removeprefix("torch.") for d in served])
        return f"no native {device.type} kernel for {str(dtype).removeprefix('torch.')}, only for {names}"
    return None


def pointer(tensor: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for none, and for a gradient that nobody needs."""
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def place(tensor: Tensor) -> tuple[int, int, int, int]:
    """How every kernel's arguments end: dtype code, device index (-1 for the CPU), CUDA stream and CPU threads."""
    code = DTYPE_CODES[tensor.dtype]
    if tensor.is_cuda:
        return code, tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream, 0
    return code, -1, 0, torch.get_num_threads()
