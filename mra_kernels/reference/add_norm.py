"""Reference of `add_norm`."""

import torch.nn.functional as F
from torch import Tensor


def add_norm(x: Tensor, delta: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, delta: [..., C] -> their sum, and its LayerNorm over the channels: both [..., C]."""
    total = x + delta
    return total, F.layer_norm(total, norm_weight.shape, norm_weight, norm_bias, eps)
