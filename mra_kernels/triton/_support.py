"""What every Triton kernel needs around it: a reason where Triton cannot serve, a late import, the tensors' device.

An op's module is imported at its first call: `import triton` takes a tenth of a second, and `import mra_kernels` must
work without it. Kernels are not tuned at run time: block sizes follow from the shape by fixed rules, so that nothing
is compiled or timed inside a CUDA graph capture after one warm-up call, and no batch size tunes anew.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mra_kernels.dispatch import Backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Triton's own variable: its interpreter runs kernels on CPU tensors, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")

PROBLEM = None if find_spec("triton") else "Triton is not installed: pip install 'triton>=3.6'"


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """None for float32, bfloat16 or float16 on a CUDA device with Triton installed, otherwise the reason."""
    if PROBLEM is not None:
        return PROBLEM
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"no Triton kernels for device type {device.type}"
    if dtype not in DTYPES:
        names = ", ".join([str(d).removeprefix("torch.") for d in DTYPES])
        return f"no Triton kernel for {str(dtype).removeprefix('torch.')}, only for {names}"
    return None


def backend(op: str) -> Backend:
    """The backend that `mra_kernels/triton/<op>.py` defines by its functions `forward` and `backward`.

    They are called with the tensors' device as the current one, where Triton launches, on its current stream.
    """

    def forward(*arguments: Any) -> Any:
        return _on_device(_module(op).forward, arguments)

    def backward(*arguments: Any) -> Any:
        return _on_device(_module(op).backward, arguments)

    return Backend(forward, backward, supports)


def _module(op: str) -> Any:
    try:
        return import_module(f"mra_kernels.triton.{op}")
    except ImportError as error:
        raise ImportError(
            f"Triton is installed, but broken ({error}); reinstall it with "
            f"pip install --force-reinstall 'triton>=3.6', or do without: MRA_BACKEND=native,reference"
        ) from error


def _on_device(function: Any, arguments: tuple) -> Any:
    tensor = next(a for a in arguments if isinstance(a, Tensor))
    if not tensor.is_cuda:
        return function(*arguments)
    with torch.cuda.device(tensor.device):
        return function(*arguments)
