"""Modules as timm and the authors of LLaVA-HR have them: the same classes' names, children, parameters and results."""

from collections.abc import Sequence
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act: nn.Module = nn.GELU()
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(4 * width, width)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = (torch.rand(len(x), 1, 1, 1) >= self.drop_prob).to(x.dtype)
        return x * kept / (1 - self.drop_prob)


class ConvNeXtBlock(nn.Module):
    """timm's; with `scale="weight"` that of the authors."""

    def __init__(self, width: int, eps: float = 1e-6, drop_path: float = 0.0, scale: str = "gamma") -> None:
        super().__init__()
        self.use_conv_mlp = False
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width)
        setattr(self, scale, nn.Parameter(torch.ones(width)))
        self.scale = scale
        self.shortcut = nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.conv_dw(x).movedim(1, -1)))
        scale = getattr(self, self.scale)
        y = (y if scale is None else y * scale).movedim(-1, 1)
        return self.shortcut(x) + self.drop_path(y)


class ConvNeXtStage(nn.Module):
    def __init__(self, before: int, width: int, depth: int, eps: float, drop_path: float, scale: str) -> None:
        super().__init__()
        halve = nn.Sequential(LayerNorm2d(before, eps=eps), nn.Conv2d(before, width, 2, stride=2))
        self.downsample = halve if before != width else nn.Identity()
        self.blocks = nn.Sequential(*(ConvNeXtBlock(width, eps, drop_path, scale) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class ConvNeXt(nn.Module):
    """Without a head: [B, 3, S1, S2] -> [B, C, S1 // 32, S2 // 32]."""

    def __init__(
        self,
        dims: Sequence[int] = (8, 12, 16, 20),
        depths: Sequence[int] = (1, 2, 1, 1),
        eps: float = 1e-6,
        drop_path: float = 0.0,
        scale: str = "gamma",
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), LayerNorm2d(dims[0], eps=eps))
        before = (dims[0], *dims[:-1])
        stages = zip(before, dims, depths, strict=True)
        self.stages = nn.Sequential(*(ConvNeXtStage(*sizes, eps, drop_path, scale) for sizes in stages))

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))


def fit(high: Tensor, count: int) -> Tensor:
    """high: [B, C, H', W'] -> tokens [B, count, C], pooled or resized onto a square grid."""
    side = isqrt(count)
    if high.shape[-1] > side:
        high = F.avg_pool2d(high, high.shape[-1] // side)
    elif high.shape[-1] < side:
        high = F.interpolate(high.float(), size=(side, side), mode="bilinear", align_corners=True).to(high.dtype)
    return high.flatten(2).transpose(1, 2)


class S2FStitchAlignModuleV2(nn.Module):
    """The authors' MR-Adapter: tokens [B, L, C_l] and a map [B, C_h, H', W'] -> [B, L, C_l]."""

    def __init__(self, fast_vision_dim: int, slow_vision_dim: int, zero_init: bool = True) -> None:
        super().__init__()
        low, high = fast_vision_dim, slow_vision_dim
        self.slow_conv = nn.Conv2d(high, high, 1)
        self.slow_proj = nn.Conv2d(high, low, 1)
        self.fast_conv = nn.Conv2d(low, low, 7, padding=3, groups=low)
        self.fast_proj = nn.Conv2d(low, low, 1)
        self.gate = nn.Sequential(nn.Linear(2 * low, low // 2), nn.GELU(), nn.Linear(low // 2, 1))
        if zero_init:
            nn.init.zeros_(self.slow_proj.weight)
            nn.init.zeros_(self.fast_proj.weight)

    def forward(self, fast_feat: Tensor, slow_feat: Tensor) -> Tensor:
        count = fast_feat.shape[1]
        high = fit(self.slow_proj(F.gelu(self.slow_conv(slow_feat))), count)
        low = fast_feat.transpose(1, 2).unflatten(2, (isqrt(count), -1))
        low = (low + self.fast_proj(F.gelu(self.fast_conv(low)))).flatten(2).transpose(1, 2)
        gate = self.gate(torch.cat([low, high], -1).mean(1))
        return low + gate.tanh()[:, None] * high


class MultiPathAlignModule(nn.Module):
    """The authors' merge; the high resolution may also be tokens [B, L', C_h]."""

    def __init__(self, fast_vision_dim: int, slow_vision_dim: int) -> None:
        super().__init__()
        self.fast_proj = nn.Linear(fast_vision_dim, fast_vision_dim)
        self.slow_proj = nn.Linear(slow_vision_dim, fast_vision_dim)

    def forward(self, fast_feat: Tensor, slow_feat: Tensor) -> Tensor:
        if slow_feat.dim() == 3:
            slow_feat = slow_feat.transpose(1, 2).unflatten(2, (isqrt(slow_feat.shape[1]), -1))
        return self.fast_proj(fast_feat) + self.slow_proj(fit(slow_feat, fast_feat.shape[1]))


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, layer scales and norms included, so that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(m.weight) for m in module.modules() if "Norm" in type(m).__name__ and hasattr(m, "weight")}
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            spread = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(noise * spread + (1 if id(parameter) in norms else 0))
    return module
