"""Native `gated_resample_add`: C++ on a CPU, CUDA C++ on a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mra_kernels.dispatch import Backend
from mra_kernels.native._extension import extension, place, pointer, unsupported


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """None for float32 and bfloat16 maps, on a GPU also float16; otherwise the reason."""
    cpu = (torch.float32, torch.bfloat16)
    return unsupported(device, dtype, cpu, cuda_dtypes=(*cpu, torch.float16))


def forward(low: Tensor, high: Tensor, gate: Tensor) -> Tensor:
    """low: [B, H, W, C], high: [B, H', W', C], gate: [B] -> [B, H, W, C]."""
    low, high, gate = low.contiguous(), high.contiguous(), gate.contiguous()
    y = torch.empty_like(low)
    extension.gated_resample_add_forward(*map(pointer, (low, high, gate, y)), *low.shape, *high.shape[1:3], *place(low))
    return y


def backward(grad_y: Tensor, high: Tensor, gate: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Gradients of high: [B, H', W', C] and gate: [B]; empty where `needs` says no."""
    grad_y, high, gate = grad_y.contiguous(), high.contiguous(), gate.contiguous()
    grad_high = torch.empty_like(high) if needs[0] else high.new_empty(0)
    grad_gate = torch.empty_like(gate) if needs[1] else gate.new_empty(0)
    # One float32 sum for each row of the low grid; the kernel adds them in a fixed order.
    partial = gate.new_empty(grad_y.shape[:2]) if needs[1] else gate.new_empty(0)
    extension.gated_resample_add_backward(
        *map(pointer, (grad_y, high, gate, grad_high, grad_gate, partial)),
        *grad_y.shape,
        *high.shape[1:3],
        *place(high),
    )
    return grad_high, grad_gate


BACKEND = Backend(forward, backward, supports)
