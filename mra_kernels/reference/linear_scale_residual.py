"""Reference of `linear_scale_residual`."""

import torch.nn.functional as F
from torch import Tensor


def linear_scale_residual(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, residual: Tensor) -> Tensor:
    """x: [..., K], weight: [N, K], scale: [N], residual: [..., N] -> residual + scale * (x W^T + b): [..., N]."""
    y = F.linear(x, weight, bias)
    return residual + (y if scale is None else scale * y)
