"""Reference of `project_mean`."""

import torch.nn.functional as F
from torch import Tensor


def project_mean(hidden_mean: Tensor, weight: Tensor, bias: Tensor, base_mean: Tensor | None) -> Tensor:
    """hidden_mean: [B, K], base_mean: [B, N] or None -> base_mean + hidden_mean W^T + b: [B, N]."""
    wide = hidden_mean.dtype
    y = F.linear(hidden_mean, weight.to(wide), bias.to(wide))
    return y if base_mean is None else base_mean + y
