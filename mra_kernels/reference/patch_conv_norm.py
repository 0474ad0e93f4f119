"""Reference of `patch_conv_norm`."""

import torch.nn.functional as F
from torch import Tensor


def patch_conv_norm(
    pixels: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """pixels: [B, P, S1, S2], weight: [C, P, k, k] -> [B, S1 // k, S2 // k, C]."""
    y = F.conv2d(pixels, weight, bias, stride=weight.shape[-1]).permute(0, 2, 3, 1)
    return F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, eps)
