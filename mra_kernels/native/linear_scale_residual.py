"""Native `linear_scale_residual`: the library's product, then scale and sum in its memory (C++ on a CPU).

Without a scale the library does it all, with the sum in its product's epilogue.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mra_kernels.dispatch import Backend
from mra_kernels.native._extension import extension, place, pointer, unsupported
from mra_kernels.native._product import linear, linear_add


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """None for float32 or bfloat16 on a CPU, otherwise the reason."""
    return unsupported(device, dtype, (torch.float32, torch.bfloat16))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, residual: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """x: [..., K], weight: [N, K], scale: [N] or None, residual: [..., N] -> y: [..., N], and the product [..., N].

    The product is empty unless `keep` wants it for the scale's gradient.
    """
    if scale is None:
        return linear_add(x, weight, bias, residual), x.new_empty(0)
    product = linear(x, weight, bias)
    residual, scale = residual.contiguous(), scale.contiguous()
    y = torch.empty_like(product) if keep else product
    extension.linear_scale_residual_forward(*map(pointer, (product, scale, residual, y)), *_sizes(y), *place(y))
    return y, product if keep else x.new_empty(0)


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    product: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias and scale; empty where `needs` says no. A product not kept is computed again."""
    empty = x.new_empty(0)
    if scale is None:
        scaled, grad_scale = grad_y, empty
        grad_bias = grad_y.reshape(-1, bias.numel()).sum(0) if needs[2] else empty
    else:
        if needs[3] and product.numel() == 0:
            product = linear(x, weight, bias)
        grad_y, scale = grad_y.contiguous(), scale.contiguous()
        scaled = torch.empty_like(grad_y)
        grad_bias = torch.empty_like(bias) if needs[2] else empty
        grad_scale = torch.empty_like(bias) if needs[3] else empty
        extension.linear_scale_residual_backward(
            *map(pointer, (grad_y, scale, product if needs[3] else None, scaled, grad_bias, grad_scale)),
            *_sizes(grad_y),
            *place(grad_y),
        )
    rows = scaled.reshape(-1, weight.shape[0])
    grad_x = (rows @ weight).reshape(x.shape) if needs[0] else empty
    grad_weight = rows.mT @ x.reshape(-1, weight.shape[1]) if needs[1] else empty
    return grad_x, grad_weight, grad_bias, grad_scale


def _sizes(y: Tensor) -> tuple[int, int]:
    """y: [..., N] -> rows and channels."""
    return y.numel() // max(y.shape[-1], 1), y.shape[-1]


BACKEND = Backend(forward, backward, supports)
