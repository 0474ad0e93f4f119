"""Reference of `adapter_gate`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def adapter_gate(
    low_mean: Tensor, high_mean: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, down_bias: Tensor
) -> Tensor:
    """Means: [B, C], up_weight: [D, 2C], down_weight: [1, D] -> tanh(W2 GELU(W1 [l, h] + b1) + b2): [B]."""
    wide = low_mean.dtype
    mean = torch.cat([low_mean, high_mean], dim=-1)
    hidden = F.gelu(F.linear(mean, up_weight.to(wide), up_bias.to(wide)))
    return F.linear(hidden, down_weight.to(wide), down_bias.to(wide)).squeeze(-1).tanh()
