"""Native `depthwise_conv_gelu`: C++ on a CPU. The backward recomputes the convolution from `x`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mra_kernels.dispatch import Backend
from mra_kernels.native._extension import extension, place, pointer, unsupported


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """None for a float32 or bfloat16 map on a CPU, otherwise the reason."""
    return unsupported(device, dtype, (torch.float32, torch.bfloat16))


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x: [B, H, W, C] -> y: [B, H, W, C], and the means of `y` and `x` over each picture: [B, C], float32."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    y_mean, x_mean = (x.new_empty((x.shape[0], x.shape[3]), dtype=torch.float32) for _ in range(2))
    extension.depthwise_conv_gelu_forward(*map(pointer, (x, weight, bias, y, y_mean, x_mean)), *x.shape, *place(x))
    return y, y_mean, x_mean


def backward(
    grad_y: Tensor | None,
    grad_y_mean: Tensor | None,
    grad_x_mean: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight and bias; empty where `needs` says no."""
    given = [None if g is None else g.contiguous() for g in (grad_y, grad_y_mean, grad_x_mean)]
    inputs = [t.contiguous() for t in (x, weight, bias)]
    grads = tuple(torch.empty_like(t) if need else x.new_empty(0) for t, need in zip(inputs, needs, strict=True))
    extension.depthwise_conv_gelu_backward(*map(pointer, (*given, *inputs, *grads)), *x.shape, *place(x))
    return grads


BACKEND = Backend(forward, backward, supports)
