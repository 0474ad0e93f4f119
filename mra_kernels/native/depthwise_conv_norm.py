"""Native `depthwise_conv_norm`: C++ on a CPU. The backward recomputes the convolution from `x` and the statistics."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mra_kernels.dispatch import Backend
from mra_kernels.native._extension import extension, place, pointer, unsupported


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """None for a float32 or bfloat16 map on a CPU, otherwise the reason."""
    return unsupported(device, dtype, (torch.float32, torch.bfloat16))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x: [B, H, W, C] -> y: [B, H, W, C], mean and rstd of the convolution's output: [B, H, W], float32."""
    x, weight, bias, norm_weight, norm_bias = (t.contiguous() for t in (x, weight, bias, norm_weight, norm_bias))
    y = torch.empty_like(x)
    mean = x.new_empty(x.shape[:3], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    extension.depthwise_conv_norm_forward(
        *map(pointer, (x, weight, bias, norm_weight, norm_bias, y, mean, rstd)),
        *x.shape,
        eps,
        *place(x),
    )
    return y, mean, rstd


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias, norm_weight and norm_bias; empty where `needs` says no."""
    grad_y, x, weight, bias, norm_weight = (t.contiguous() for t in (grad_y, x, weight, bias, norm_weight))
    inputs = (x, weight, bias, norm_weight, norm_bias)
    grads = tuple(torch.empty_like(t) if need else x.new_empty(0) for t, need in zip(inputs, needs, strict=True))
    extension.depthwise_conv_norm_backward(
        *map(pointer, (grad_y, x, weight, bias, norm_weight, mean, rstd, *grads)),
        *x.shape,
        *place(x),
    )
    return grads


BACKEND = Backend(forward, backward, supports)
