"""Reference of `norm_patchify`."""

import torch.nn.functional as F
from torch import Tensor


def norm_patchify(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> Tensor:
    """x: [B, H, W, C] -> [B, H // 2, W // 2, 4 * C]; a row holds its 2x2 patch as (dy, dx, c)."""
    batch, height, width, channels = x.shape
    y = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    y = y[:, : height // 2 * 2, : width // 2 * 2]
    y = y.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return y.transpose(2, 3).reshape(batch, height // 2, width // 2, 4 * channels)
