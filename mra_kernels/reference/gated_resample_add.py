"""Reference of `gated_resample_add`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_resample_add(low: Tensor, high: Tensor, gate: Tensor) -> Tensor:
    """low: [B, H, W, C], high: [B, H', W', C], gate: [B] -> low + gate * resample(high): [B, H, W, C]."""
    return low + gate[:, None, None, None].to(low.dtype) * resample(high, low.shape[1], low.shape[2])


def resample(x: Tensor, height: int, width: int) -> Tensor:
    """x: [B, H', W', C] -> [B, height, width, C]: averaged where larger, bilinear, corners aligned, where smaller."""
    if x.shape[1:3] == (height, width):
        return x
    channels_first = x.permute(0, 3, 1, 2)
    if x.shape[1] > height or x.shape[2] > width:
        y = F.avg_pool2d(channels_first, (x.shape[1] // height, x.shape[2] // width))
    else:
        wide = channels_first.to(torch.promote_types(x.dtype, torch.float32))
        y = F.interpolate(wide, size=(height, width), mode="bilinear", align_corners=True).to(x.dtype)
    return y.permute(0, 2, 3, 1)
