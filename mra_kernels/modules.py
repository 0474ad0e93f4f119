"""The ops bound to parameters: ConvNeXt's stem, block and downsample, its trunk, the MR-Adapter and the merge.

Maps are channels last, [B, H, W, C]. Modules hold bare parameters rather than nn.Linear or nn.Conv2d children, so that
tools which replace such children do not empty the weights that a fused op reads.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mra_kernels.dispatch import is_reference
from mra_kernels.ops import (
    adapter_gate,
    depthwise_conv_gelu,
    depthwise_conv_norm,
    gated_projection_add,
    gated_resample_add,
    linear_gelu,
    linear_scale_residual,
    norm_patchify,
    patch_conv_norm,
    project_mean,
)
from mra_kernels.ops.gated_resample_add import check_grids
from mra_kernels.reference import mr_adapter as reference


class Stem(nn.Module):
    """ConvNeXt stem: convolution k x k with stride k, then LayerNorm. [B, P, S1, S2] -> [B, S1 // k, S2 // k, C]."""

    def __init__(self, in_channels: int, channels: int, patch_size: int = 4, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels, in_channels, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(channels))
        self.norm_weight = nn.Parameter(torch.empty(channels))
        self.norm_bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights, std 0.02 (ConvNeXt, arXiv 2201.03545); LayerNorm at identity."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [B, P, S1, S2] -> [B, S1 // k, S2 // k, C]."""
        return patch_conv_norm(pixels, self.weight, self.bias, self.norm_weight, self.norm_bias, self.eps)


class ConvNeXtBlock(nn.Module):
    """ConvNeXt block: depthwise 7x7, LayerNorm, MLP of 4x with GELU, layer scale, residual. -> [B, H, W, C]."""

    def __init__(self, channels: int, eps: float = 1e-6, layer_scale_init: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.layer_scale_init = layer_scale_init
        self.conv_weight = nn.Parameter(torch.empty(channels, 1, 7, 7))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.norm_weight = nn.Parameter(torch.empty(channels))
        self.norm_bias = nn.Parameter(torch.empty(channels))
        self.up_weight = nn.Parameter(torch.empty(4 * channels, channels))
        self.up_bias = nn.Parameter(torch.empty(4 * channels))
        self.down_weight = nn.Parameter(torch.empty(channels, 4 * channels))
        self.down_bias = nn.Parameter(torch.empty(channels))
        self.layer_scale = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights, std 0.02; layer scale at its small initial value."""
        for weight in (self.conv_weight, self.up_weight, self.down_weight):
            nn.init.trunc_normal_(weight, std=0.02)
        for bias in (self.conv_bias, self.norm_bias, self.up_bias, self.down_bias):
            nn.init.zeros_(bias)
        nn.init.ones_(self.norm_weight)
        nn.init.constant_(self.layer_scale, self.layer_scale_init)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, C] -> [B, H, W, C]."""
        y = depthwise_conv_norm(x, self.conv_weight, self.conv_bias, self.norm_weight, self.norm_bias, self.eps)
        hidden = linear_gelu(y, self.up_weight, self.up_bias)
        return linear_scale_residual(hidden, self.down_weight, self.down_bias, self.layer_scale, x)


class Downsample(nn.Module):
    """LayerNorm, then convolution 2x2 with stride 2. [B, H, W, C] -> [B, H // 2, W // 2, N]."""

    def __init__(self, in_channels: int, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.norm_weight = nn.Parameter(torch.empty(in_channels))
        self.norm_bias = nn.Parameter(torch.empty(in_channels))
        # [N, dy, dx, C] is a convolution's weight [N, C, dy, dx] in the order of a patch row.
        self.weight = nn.Parameter(torch.empty(channels, 2, 2, in_channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights, std 0.02; LayerNorm at identity."""
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, C] -> [B, H // 2, W // 2, N]."""
        patches = norm_patchify(x, self.norm_weight, self.norm_bias, self.eps)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class ConvNeXtStage(nn.Module):
    """A downsample (None in the first stage) and its blocks. [B, H, W, C] -> [B, H // 2, W // 2, N]."""

    def __init__(self, downsample: Downsample | None, blocks: Sequence[ConvNeXtBlock]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, C] -> [B, H // 2, W // 2, N], the first stage [B, H, W, C]."""
        if self.downsample is not None:
            x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class ConvNeXt(nn.Module):
    """ConvNeXt trunk (arXiv 2201.03545) without its head. [B, 3, S1, S2] -> [B, S1 // 32, S2 // 32, C].

    Args:
        channels: of each stage.
        depths: blocks of each stage.
        eps: of every LayerNorm: 1e-6 in ConvNeXt-L, 1e-5 in ConvNeXt-XXL.
        layer_scale_init: initial layer scale.
    """

    block_class: type[ConvNeXtBlock] = ConvNeXtBlock

    def __init__(
        self,
        channels: Sequence[int],
        depths: Sequence[int],
        eps: float = 1e-6,
        layer_scale_init: float = 1e-6,
        in_channels: int = 3,
        patch_size: int = 4,
    ) -> None:
        super().__init__()
        block = partial(self.block_class, eps=eps, layer_scale_init=layer_scale_init)
        self.stem = Stem(in_channels, channels[0], patch_size, eps)
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(channels, depths, strict=True)):
            downsample = Downsample(channels[i - 1], width, eps) if i else None
            self.stages.append(ConvNeXtStage(downsample, [block(width) for _ in range(depth)]))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [B, P, S1, S2] -> [B, S1 // 32, S2 // 32, C]."""
        x = self.stem(pixels)
        for stage in self.stages:
            x = stage(x)
        return x


ADAPTER_PARAMETERS = tuple(
    f"{part}_{kind}"
    for part in ("low_conv", "low_proj", "high_conv", "high_proj", "gate_up", "gate_down")
    for kind in ("weight", "bias")
)


class MRAdapter(nn.Module):
    """MR-Adapter (arXiv 2403.03003, equations 3 to 5): adds the gated high-resolution map to the low-resolution one.

    A 1x1 convolution commutes with a mean, so the gate is known from the means of the hidden activations before the
    projections run; then projections, gate and residual are one op. Pooling commutes with the projection too and comes
    first; a bilinear resize comes after it, on fewer rows, and its mean is a weighted mean of its source.
    """

    def __init__(self, low_channels: int, high_channels: int) -> None:
        super().__init__()
        low, high = low_channels, high_channels
        self.low_conv_weight = nn.Parameter(torch.empty(low, 1, 7, 7))
        self.low_conv_bias = nn.Parameter(torch.empty(low))
        self.low_proj_weight = nn.Parameter(torch.empty(low, low))
        self.low_proj_bias = nn.Parameter(torch.empty(low))
        self.high_conv_weight = nn.Parameter(torch.empty(high, high))
        self.high_conv_bias = nn.Parameter(torch.empty(high))
        self.high_proj_weight = nn.Parameter(torch.empty(low, high))
        self.high_proj_bias = nn.Parameter(torch.empty(low))
        self.gate_up_weight = nn.Parameter(torch.empty(low // 2, 2 * low))
        self.gate_up_bias = nn.Parameter(torch.empty(low // 2))
        self.gate_down_weight = nn.Parameter(torch.empty(1, low // 2))
        self.gate_down_bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Both projections start at zero, so that training starts from the plain ViT."""
        for weight in (self.low_conv_weight, self.high_conv_weight, self.gate_up_weight, self.gate_down_weight):
            nn.init.trunc_normal_(weight, std=0.02)
        for parameter in (self.low_proj_weight, self.high_proj_weight):
            nn.init.zeros_(parameter)
        for name, parameter in self.named_parameters():
            if name.endswith("_bias"):
                nn.init.zeros_(parameter)

    def forward(self, low: Tensor, high: Tensor, hidden: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """low: [B, H, W, C_l], high: [B, H', W', C_h] -> [B, H, W, C_l].

        `hidden` is what the adapter's first 1x1 convolution makes of `high`, where adapters of the same map had it
        computed together: GELU(Conv1x1(high)), [B, H', W', C_h], and its mean weighted by `resample_mean_weights`,
        [B, C_h] in float32. The reference computes it itself.
        """
        return mr_adapter(low, high, {name: getattr(self, name) for name in ADAPTER_PARAMETERS}, hidden)


class Merge(nn.Module):
    """The merge after the last quarter: Linear(low) + Linear(resample(high)). -> [B, H, W, C_l]."""

    def __init__(self, low_channels: int, high_channels: int) -> None:
        super().__init__()
        self.low_weight = nn.Parameter(torch.empty(low_channels, low_channels))
        self.low_bias = nn.Parameter(torch.empty(low_channels))
        self.high_weight = nn.Parameter(torch.empty(low_channels, high_channels))
        self.high_bias = nn.Parameter(torch.empty(low_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights, std 0.02."""
        nn.init.trunc_normal_(self.low_weight, std=0.02)
        nn.init.trunc_normal_(self.high_weight, std=0.02)
        nn.init.zeros_(self.low_bias)
        nn.init.zeros_(self.high_bias)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """low: [B, H, W, C_l], high: [B, H', W', C_h] -> [B, H, W, C_l]."""
        return merge(low, high, self.low_weight, self.low_bias, self.high_weight, self.high_bias)


def mr_adapter(
    low: Tensor, high: Tensor, parameters: Mapping[str, Tensor], hidden: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """`MRAdapter` as a function, on parameters by their names there."""
    check_grids("MRAdapter", low, high)
    if is_reference():
        return reference.mr_adapter(low, high, dict(parameters))
    p = parameters
    height, width = low.shape[1:3]
    smaller = high.shape[1] < height or high.shape[2] < width
    if hidden is None:
        weights = resample_mean_weights(high.shape[1:3], (height, width), low.new_empty(0, dtype=_wide(low)))
        hidden = linear_gelu(high, p["high_conv_weight"], p["high_conv_bias"], weights)
    high_hidden, high_mean = hidden
    low_hidden, hidden_mean, low_mean = depthwise_conv_gelu(low, p["low_conv_weight"], p["low_conv_bias"])
    gate = adapter_gate(
        project_mean(hidden_mean, p["low_proj_weight"], p["low_proj_bias"], low_mean),
        project_mean(high_mean, p["high_proj_weight"], p["high_proj_bias"]),
        p["gate_up_weight"],
        p["gate_up_bias"],
        p["gate_down_weight"],
        p["gate_down_bias"],
    )
    if smaller:
        high = F.linear(high_hidden, p["high_proj_weight"], p["high_proj_bias"])
        low = linear_scale_residual(low_hidden, p["low_proj_weight"], p["low_proj_bias"], None, low)
        return gated_resample_add(low, high, gate)
    return gated_projection_add(
        low,
        low_hidden,
        p["low_proj_weight"],
        p["low_proj_bias"],
        reference.resample(high_hidden, height, width),
        p["high_proj_weight"],
        p["high_proj_bias"],
        gate,
    )


def merge(
    low: Tensor, high: Tensor, low_weight: Tensor, low_bias: Tensor, high_weight: Tensor, high_bias: Tensor
) -> Tensor:
    """`Merge` as a function."""
    check_grids("Merge", low, high)
    if is_reference():
        return reference.merge(low, high, low_weight, low_bias, high_weight, high_bias)
    height, width = low.shape[1:3]
    if high.shape[1] > height or high.shape[2] > width:
        high = reference.resample(high, height, width)
    # One GEMM writes the sum, the other adds to it, or its output is resampled into it.
    y = F.linear(low, low_weight, low_bias)
    if high.shape[1:3] == low.shape[1:3]:
        return linear_scale_residual(high, high_weight, high_bias, None, y)
    high = F.linear(high, high_weight, high_bias)
    return gated_resample_add(y, high, torch.ones(low.shape[0], dtype=_wide(low), device=low.device))


def resample_mean_weights(source: Sequence[int], target: Sequence[int], like: Tensor) -> Tensor:
    """The weight of each source position in the mean over the resampled grid: [H' * W'], dtype and device of `like`."""
    rows, columns = (_mean_weights(size, onto, like) for size, onto in zip(source, target, strict=True))
    return torch.outer(rows, columns).flatten()


def _mean_weights(source: int, target: int, like: Tensor) -> Tensor:
    """One axis: uniform for pooling and the same grid, triangular sums for a resize with aligned corners."""
    if source >= target or source == 1:
        return like.new_full((source,), 1.0 / source)
    position = torch.arange(target, device=like.device, dtype=like.dtype) * ((source - 1) / (target - 1))
    nodes = torch.arange(source, device=like.device, dtype=like.dtype)
    return (1 - (position[:, None] - nodes).abs()).clamp(min=0).mean(0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
