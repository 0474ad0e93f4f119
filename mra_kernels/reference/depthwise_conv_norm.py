"""Reference of `depthwise_conv_norm`."""

import torch.nn.functional as F
from torch import Tensor


def depthwise_conv_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """x: [B, H, W, C], weight: [C, 1, 7, 7] -> [B, H, W, C]."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=3, groups=x.shape[-1]).permute(0, 2, 3, 1)
    return F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, eps)
