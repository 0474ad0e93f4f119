"""Reference of `depthwise_conv_gelu`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_conv_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x: [B, H, W, C], weight: [C, 1, 7, 7] -> y: [B, H, W, C], its means [B, C], the input's means [B, C]."""
    y = F.gelu(F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=3, groups=x.shape[-1])).permute(0, 2, 3, 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    return y, y.mean((1, 2), dtype=wide), x.mean((1, 2), dtype=wide)
