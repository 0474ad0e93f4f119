"""Native `linear_scale_residual`: the library's product, then scale and sum in its memory (C++ on a CPU)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mra_kernels.dispatch import Backend
from mra_kernels.native._extension import DTYPE_CODES, extension, pointer, unsupported


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """None for float32 or bfloat16 on a CPU, otherwise the reason."""
    return unsupported(device, dtype, (torch.float32, torch.bfloat16))


def forward(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, residual: Tensor) -> Tensor:
    """x: [..., K], weight: [N, K], scale: [N] or None, residual: [..., N] -> [..., N]."""
    y = F.linear(x, weight, bias).contiguous()
    residual = residual.contiguous()
    scale = None if scale is None else scale.contiguous()
    channels = weight.shape[0]
    extension.linear_scale_residual_forward(
        *map(pointer, (y, scale, residual)),
        y.numel() // max(channels, 1),
        channels,
        DTYPE_CODES[y.dtype],
        torch.get_num_threads(),
    )
    return y


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias and scale; empty where `needs` says no.

    With P = grad_y^T x, the weight's gradient is scale * P, and the scale's is sum_k P[n, k] W[n, k] plus b[n] times
    the sum of grad_y[n]: the product x W^T itself is neither kept nor computed again.
    """
    rows, inputs = grad_y.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
    factor = torch.ones_like(bias) if scale is None else scale
    empty = x.new_empty(0)
    product = rows.mT @ inputs if needs[1] or needs[3] else empty
    total = rows.sum(0, dtype=torch.float32) if needs[2] or needs[3] else empty
    grad_x = ((rows * factor) @ weight).reshape(x.shape) if needs[0] else empty
    grad_weight = factor[:, None] * product if needs[1] else empty
    grad_bias = (factor * total).to(bias.dtype) if needs[2] else empty
    grad_scale = empty
    if needs[3]:
        grad_scale = ((product.float() * weight.float()).sum(1) + bias.float() * total).to(bias.dtype)
    return grad_x, grad_weight, grad_bias, grad_scale


BACKEND = Backend(forward, backward, supports)
