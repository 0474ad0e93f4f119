"""Reference of `gated_projection_add`."""

import torch.nn.functional as F
from torch import Tensor


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
    """low: [B, ..., N], hidden: [B, ..., K_l], [B, ..., K_h], gate: [B] -> low + l W_l^T + b_l + g (h W_h^T + b_h)."""
    gate = gate.to(low.dtype).reshape(-1, *[1] * (low.dim() - 1))
    return low + F.linear(low_hidden, low_weight, low_bias) + gate * F.linear(high_hidden, high_weight, high_bias)
