"""Native `linear_gelu`: the library's product with GELU in its epilogue; C++ on a CPU for the mean and for backward."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mra_kernels.dispatch import Backend
from mra_kernels.native._extension import extension, place, pointer, unsupported
from mra_kernels.native._product import linear


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """None for float32 or bfloat16 on a CPU, otherwise the reason."""
    return unsupported(device, dtype, (torch.float32, torch.bfloat16))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, mean_weights: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x: [B, ..., K] -> y: [B, ..., N], its weighted means [B, N], float32, and the product [B, ..., N].

    Without `mean_weights` there are no means; the product is empty unless `keep` wants it for backward.
    """
    product = linear(x, weight, bias) if keep else x.new_empty(0)
    y = torch.empty_like(product) if keep else linear(x, weight, bias, "gelu")
    y_mean = x.new_empty(0)
    if mean_weights is not None:
        mean_weights = mean_weights.contiguous()
        y_mean = x.new_zeros((x.shape[0], weight.shape[0]), dtype=torch.float32)
    if keep or mean_weights is not None:
        extension.linear_gelu_forward(
            *map(pointer, (product, y, mean_weights, y_mean)),
            *_sizes(y),
            *place(y),
        )
    return y, y_mean, product


def backward(
    grad_y: Tensor | None,
    grad_y_mean: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean_weights: Tensor | None,
    product: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight and bias; empty where `needs` says no. A product that was not kept is computed again."""
    if product.numel() == 0:
        product = linear(x, weight, bias)
    if mean_weights is None:
        grad_y_mean = None
    given = [None if t is None else t.contiguous() for t in (grad_y, grad_y_mean)]
    mean_weights = None if mean_weights is None else mean_weights.contiguous()
    grad_product = torch.empty_like(product)
    grad_bias = torch.empty_like(bias) if needs[2] else x.new_empty(0)
    extension.linear_gelu_backward(
        *map(pointer, (*given, product, mean_weights, grad_product, grad_bias)),
        *_sizes(product),
        *place(product),
    )
    rows = grad_product.reshape(-1, weight.shape[0])
    grad_x = (rows @ weight).reshape(x.shape) if needs[0] else x.new_empty(0)
    grad_weight = rows.mT @ x.reshape(-1, weight.shape[1]) if needs[1] else x.new_empty(0)
    return grad_x, grad_weight, grad_bias


def _sizes(y: Tensor) -> tuple[int, int, int]:
    """y: [B, ..., N] -> pictures, positions of a picture, channels."""
    return y.shape[0], math.prod(y.shape[1:-1]), y.shape[-1]


BACKEND = Backend(forward, backward, supports)
