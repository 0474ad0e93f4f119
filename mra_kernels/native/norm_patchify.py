"""Native `norm_patchify`: C++ on a CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mra_kernels.dispatch import Backend
from mra_kernels.native._extension import extension, place, pointer, unsupported


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """None for a float32 or bfloat16 map on a CPU, otherwise the reason."""
    return unsupported(device, dtype, (torch.float32, torch.bfloat16))


def forward(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x: [B, H, W, C] -> y: [B, H // 2, W // 2, 4 * C], mean and rstd of `x`: [B, H, W], float32."""
    x, norm_weight, norm_bias = x.contiguous(), norm_weight.contiguous(), norm_bias.contiguous()
    batch, height, width, channels = x.shape
    y = x.new_empty((batch, height // 2, width // 2, 4 * channels))
    mean = x.new_empty(x.shape[:3], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    extension.norm_patchify_forward(
        *map(pointer, (x, norm_weight, norm_bias, y, mean, rstd)),
        *x.shape,
        eps,
        *place(x),
    )
    return y, mean, rstd


def backward(
    grad_y: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, norm_weight and norm_bias; empty where `needs` says no."""
    grad_y, x, norm_weight = grad_y.contiguous(), x.contiguous(), norm_weight.contiguous()
    inputs = (x, norm_weight, norm_bias.contiguous())
    grads = tuple(torch.empty_like(t) if need else x.new_empty(0) for t, need in zip(inputs, needs, strict=True))
    extension.norm_patchify_backward(
        *map(pointer, (grad_y, x, norm_weight, mean, rstd, *grads)),
        *x.shape,
        *place(x),
    )
    return grads


BACKEND = Backend(forward, backward, supports)
