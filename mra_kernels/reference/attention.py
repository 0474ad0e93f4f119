"""Reference of `attention`."""

import torch.nn.functional as F
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """query: [B, L, H, D], key and value: [B, M, H, D] -> [B, L, H, D]."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)
