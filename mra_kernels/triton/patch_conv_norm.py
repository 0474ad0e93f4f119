"""`patch_conv_norm` in Triton: patches of pixels times the weight as one product, bias and LayerNorm in its registers.

Work: a program owns the patches of a block and all channels; it gathers its rows of patches straight from the planes,
so no copy of the picture is written. Where there are too many channels for registers, programs own 256 of them each,
and the second kernel normalizes. Bytes: pixels once in, the map once out, which at 3 planes and 4x4 patches is 96 bytes
in and 2 C out a patch: bound by memory. float32 is multiplied in full precision.

Backward is the norm's, by `layer_norm_backward`, between the library's products, as no patch overlaps another. The
convolution is computed again, rounded to the dtype, so the statistics are those of the rounded values.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mra_kernels.triton._layer_norm import layer_norm, layer_norm_backward, normalize

# The most channels that a program owns with their norm, and without.
FUSED_CHANNELS, CHANNELS = 512, 256
# The largest block of the reduction.
DEPTH = 32


def forward(
    pixels: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """pixels: [B, P, S1, S2] -> y: [B, S1 // k, S2 // k, C], mean and rstd of the convolution: [B, ...], float32."""
    pixels, weight, bias, norm_weight, norm_bias = (
        t.contiguous() for t in (pixels, weight, bias, norm_weight, norm_bias)
    )
    batch, planes, height, width = pixels.shape
    channels, patch = weight.shape[0], weight.shape[3]
    grid = (batch, height // patch, width // patch)
    y = pixels.new_empty((*grid, channels))
    mean, rstd = (pixels.new_empty(grid, dtype=torch.float32) for _ in range(2))
    count, depth = mean.numel(), planes * patch * patch
    if count == 0:
        return y, mean, rstd
    rows, columns, warps = block_of(channels, pixels.dtype)
    fused = channels <= FUSED_CHANNELS
    _patch_conv_norm[(triton.cdiv(count, rows), triton.cdiv(channels, columns))](
        pixels,
        weight,
        bias,
        norm_weight,
        norm_bias,
        y,
        mean,
        rstd,
        count,
        planes,
        height,
        width,
        channels,
        depth,
        eps,
        patch,
        fused,
        rows,
        columns,
        max(16, min(DEPTH, triton.next_power_of_2(depth))),
        num_warps=warps,
        num_stages=1,
    )
    return (y, mean, rstd) if fused else (y, *layer_norm(y, norm_weight, norm_bias, eps, y))


def block_of(channels: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Patches and channels of a program, and its warps."""
    columns = triton.next_power_of_2(channels) if channels <= FUSED_CHANNELS else CHANNELS
    columns = max(16, columns)
    rows = 16 if dtype == torch.float32 else 64
    return rows, columns, 8 if rows * columns >= 8192 else 4


def backward(
    grad_y: Tensor,
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of pixels, weight, bias, norm_weight and norm_bias; empty where `needs` says no."""
    channels, patch = weight.shape[0], weight.shape[3]
    rows = _patch_rows(pixels, patch)
    flat = weight.reshape(channels, -1)
    conv = F.linear(rows, flat, bias).view(*mean.shape, channels)
    grad_conv = torch.empty_like(conv) if needs[0] or needs[1] else None
    vectors = layer_norm_backward(
        grad_y.contiguous(), conv, norm_weight.contiguous(), None, eps, grad_conv, (needs[3], needs[4], needs[2])
    )
    grad_pixels = grad_weight = pixels.new_empty(0)
    if grad_conv is not None:
        grad_rows = grad_conv.view(-1, channels)
        grad_pixels = _pixels(grad_rows @ flat, pixels, patch) if needs[0] else grad_pixels
        grad_weight = (grad_rows.mT @ rows).view(weight.shape) if needs[1] else grad_weight
    grad_norm_weight, grad_norm_bias, grad_bias = vectors
    return grad_pixels, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias


def _patch_rows(pixels: Tensor, patch: int) -> Tensor:
    """pixels: [B, P, S1, S2] -> [B * (S1 // k) * (S2 // k), P * k * k]."""
    batch, planes, height, width = pixels.shape
    whole = pixels[:, :, : height // patch * patch, : width // patch * patch]
    split = whole.reshape(batch, planes, height // patch, patch, width // patch, patch)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(-1, planes * patch * patch)


def _pixels(rows: Tensor, like: Tensor, patch: int) -> Tensor:
    """The inverse: rows of patches -> [B, P, S1, S2], zero past the last whole patch."""
    batch, planes, height, width = like.shape
    split = rows.reshape(batch, height // patch, width // patch, planes, patch, patch).permute(0, 3, 1, 4, 2, 5)
    whole = split.reshape(batch, planes, height // patch * patch, width // patch * patch)
    return whole if whole.shape == like.shape else F.pad(whole, (0, width % patch, 0, height % patch))


@triton.jit(do_not_specialize=["count", "planes", "height", "width"])
def _patch_conv_norm(
    pixels,
    weight,
    bias,
    norm_weight,
    norm_bias,
    y,
    mean,
    rstd,
    count,
    planes,
    height,
    width,
    channels,
    depth,
    eps,
    PATCH: tl.constexpr,
    FUSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """pixels: [B, planes, height, width], weight: [channels, depth] -> y: [count, channels], mean, rstd: [count]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    grid_height = height // PATCH
    grid_width = width // PATCH
    picture = row // grid_width // grid_height
    corner_y = row // grid_width % grid_height * PATCH
    corner = (picture * planes * height + corner_y) * width + row % grid_width * PATCH
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_c = c < channels
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)
        inside_k = k < depth
        plane_row = (k // (PATCH * PATCH)).to(tl.int64) * height + k // PATCH % PATCH
        at = corner[:, None] + (plane_row * width + k % PATCH)[None, :]
        a = tl.load(pixels + at, mask=inside[:, None] & inside_k[None, :], other=0.0)
        b = tl.load(weight + c[None, :] * depth + k[:, None], mask=inside_k[:, None] & inside_c[None, :], other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    value = sums + tl.load(bias + c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
    if FUSED:
        normal, center, scale = normalize(tl.where(inside_c[None, :], value, 0.0), inside_c, channels, eps)
        gain = tl.load(norm_weight + c, mask=inside_c, other=0.0).to(tl.float32)
        shift = tl.load(norm_bias + c, mask=inside_c, other=0.0).to(tl.float32)
        value = tl.fma(normal, gain[None, :], shift[None, :])
        tl.store(mean + row, center, mask=inside)
        tl.store(rstd + row, scale, mask=inside)
    to = row[:, None] * channels + c[None, :]
    tl.store(y + to, value.to(y.dtype.element_ty), mask=inside[:, None] & inside_c[None, :])
