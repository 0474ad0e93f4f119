"""`norm_patchify` in Triton: LayerNorm, whose rows are written where the 2x2 patches want them; see `_layer_norm`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mra_kernels.triton._layer_norm import layer_norm, layer_norm_backward


def forward(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x: [B, H, W, C] -> y: [B, H // 2, W // 2, 4 * C], mean and rstd of `x`: [B, H, W], float32."""
    x, norm_weight, norm_bias = x.contiguous(), norm_weight.contiguous(), norm_bias.contiguous()
    batch, height, width, channels = x.shape
    y = x.new_empty((batch, height // 2, width // 2, 4 * channels))
    return y, *layer_norm(x, norm_weight, norm_bias, eps, y, patches=True)


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
    grad_x = torch.empty_like(x) if needs[0] else None
    vectors = layer_norm_backward(
        grad_y, x, norm_weight, (mean, rstd), eps, grad_x, needs=(needs[1], needs[2], False), patches=True
    )
    return x.new_empty(0) if grad_x is None else grad_x, *vectors[:2]
