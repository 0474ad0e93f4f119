"""Reference of `linear_gelu`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, mean_weights: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """x: [B, ..., K], weight: [N, K] -> y: [B, ..., N], and with mean_weights [L] also sum_l w_l y[b, l]: [B, N]."""
    y = F.gelu(F.linear(x, weight, bias))
    if mean_weights is None:
        return y
    wide = torch.promote_types(y.dtype, torch.float32)
    return y, torch.einsum("bln,l->bn", y.flatten(1, -2).to(wide), mean_weights.detach())
