"""The twelve ops written out by hand, for float64: nothing here shares code with what is tested.

Convolutions are sums of shifted maps, norms their formulas, a resize gathers its two neighbors. `uncentered` leaves
out what a LayerNorm subtracts, forward and backward: the result is the size of the terms that cancel in the true one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.T + bias


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, uncentered: bool) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    rstd = ((x - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    if uncentered:
        mean, rstd = torch.zeros_like(mean), rstd.detach()
    return (x - mean) * rstd * weight + bias


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, 3, 3, 3, 3))
    y = bias.expand_as(x)
    for i in range(7):
        for j in range(7):
            y = y + padded[:, i : i + height, j : j + width] * weight[:, 0, i, j]
    return y


def depthwise_conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    uncentered: bool = False,
) -> Tensor:
    return layer_norm(depthwise(x, weight, bias), norm_weight, norm_bias, eps, uncentered)


def depthwise_conv_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = gelu(depthwise(x, weight, bias))
    return y, y.mean((1, 2)), x.mean((1, 2))


def add_norm(
    x: Tensor, delta: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, uncentered: bool = False
) -> tuple[Tensor, Tensor]:
    return x + delta, layer_norm(x + delta, norm_weight, norm_bias, eps, uncentered)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = scale * torch.einsum("blhd,bmhd->bhlm", query, key)
    exponentials = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    return torch.einsum("bhlm,bmhd->blhd", exponentials / exponentials.sum(-1, keepdim=True), value)


def norm_patchify(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, uncentered: bool = False) -> Tensor:
    y = layer_norm(x, norm_weight, norm_bias, eps, uncentered)
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    quarters = [y[:, dy:height:2, dx:width:2] for dy in (0, 1) for dx in (0, 1)]
    return torch.cat(quarters, dim=-1)


def patch_conv_norm(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    uncentered: bool = False,
) -> Tensor:
    k = weight.shape[-1]
    height, width = pixels.shape[2] // k, pixels.shape[3] // k
    patches = pixels[:, :, : height * k, : width * k].unflatten(3, (width, k)).unflatten(2, (height, k))
    y = linear(patches.permute(0, 2, 4, 1, 3, 5).flatten(3), weight.flatten(1), bias)
    return layer_norm(y, norm_weight, norm_bias, eps, uncentered)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, mean_weights: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    y = gelu(linear(x, weight, bias))
    if mean_weights is None:
        return y
    return y, (y.flatten(1, -2) * mean_weights[:, None]).sum(1)


def linear_scale_residual(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, residual: Tensor) -> Tensor:
    y = linear(x, weight, bias)
    return residual + (y if scale is None else scale * y)


def pool(x: Tensor, dim: int, size: int) -> Tensor:
    return x.unflatten(dim, (size, x.shape[dim] // size)).mean(dim + 1)


def interpolate(x: Tensor, dim: int, size: int) -> Tensor:
    """Linear along one dimension, the first and last elements at the first and last positions."""
    last = x.shape[dim] - 1
    position = torch.arange(size, dtype=torch.float64) * (last / max(size - 1, 1))
    near = position.floor().long().clamp(max=last)
    far = (near + 1).clamp(max=last)
    share = (position - near).reshape(-1, *[1] * (x.dim() - 1 - dim)).to(x.device)
    return x.index_select(dim, near.to(x.device)) * (1 - share) + x.index_select(dim, far.to(x.device)) * share


def gated_resample_add(low: Tensor, high: Tensor, gate: Tensor) -> Tensor:
    height, width = low.shape[1:3]
    if high.shape[1:3] != low.shape[1:3]:
        step = pool if high.shape[1] > height or high.shape[2] > width else interpolate
        high = step(step(high, 1, height), 2, width)
    return low + gate[:, None, None, None] * high


def gated_projection_add(
    low: Tensor,
    low_hidden: Tensor,
    low_weight: Tensor,
    low_bias: Tensor,
    high_hidden: Tensor,
    high_weight: Tensor,
    high_bias: Tensor,
    gate: Tensor,
) -> Tensor:
    gate = gate.reshape(-1, *[1] * (low.dim() - 1))
    return low + linear(low_hidden, low_weight, low_bias) + gate * linear(high_hidden, high_weight, high_bias)


def project_mean(hidden_mean: Tensor, weight: Tensor, bias: Tensor, base_mean: Tensor | None) -> Tensor:
    y = linear(hidden_mean, weight, bias)
    return y if base_mean is None else base_mean + y


def adapter_gate(
    low_mean: Tensor, high_mean: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, down_bias: Tensor
) -> Tensor:
    hidden = gelu(linear(torch.cat([low_mean, high_mean], 1), up_weight, up_bias))
    return torch.tanh(linear(hidden, down_weight, down_bias))[:, 0]
