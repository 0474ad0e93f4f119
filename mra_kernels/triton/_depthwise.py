"""Depthwise 7x7 convolution of a channels-last map, zero padding 3, with what may follow it in registers.

Work: a program owns a tile of 8 rows, 16 columns and 64 channels of one picture. A thread of its four warps has one
column and 8 channels, which it loads as 16 bytes, and one float32 sum for each row of the tile. For each of the seven
columns of taps it marches down the 14 rows that the tile reads: each is loaded once and goes into up to seven sums. So
every multiplication counts, at any height of the tile, and the loop has 7 taps in registers; 49 would spill. Where a
batch has too few tiles to fill a GPU, they have 32 channels, and where accesses are narrow, 4 rows.

Bytes: the map once in and once out; the halo, 14 / 8 of the rows and 22 / 16 of the columns, comes from the caches.
FLOPs: 98 an element: bound by the issue of FMAs, which are 61% of the instructions of the loop (sm_90, bfloat16).

Fused, by the pointers that are given: the bias; GELU with the sums of its output and of `x` over the tile; the
derivative of GELU times a gradient; a constant. The gradient of the input is the same convolution with flipped taps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mra_kernels.triton._gelu import gelu, gelu_derivative
from mra_kernels.triton._sums import add_partials

# Columns of a tile, and the most channels.
COLUMNS, CHANNELS = 16, 64
# Programs below which tiles are halved: two for each of an H100's 132 SMs.
FEW_PROGRAMS = 264


def spread_taps(weight: Tensor) -> Tensor:
    """weight: [C, 1, 7, 7] -> [49, C'] in float32, where C' is C rounded up to whole blocks: a row is one tap."""
    channels = weight.shape[0]
    taps = weight.new_empty((49, triton.cdiv(channels, CHANNELS) * CHANNELS), dtype=torch.float32)
    # What is behind the last channel is multiplied, but reaches no result.
    taps[:, :channels].copy_(weight.reshape(channels, 49).t())
    return taps


def convolve(
    x: Tensor, taps: Tensor, bias: Tensor | None = None, constant: Tensor | None = None, flipped: bool = False
) -> Tensor:
    """x: [B, H, W, C], contiguous, taps: see `spread_taps`, bias: [C] -> [B, H, W, C].

    Args:
        constant: [B, C], float32; its mean over H * W positions is added everywhere, so a total is spread over them.
        flipped: turns the taps by 180 degrees: the gradient of the convolution's input from that of its output.
    """
    y = torch.empty_like(x)
    _launch(x, taps, bias, y, constant=constant, flipped=flipped)
    return y


def convolve_gelu(x: Tensor, taps: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GELU of the convolution: [B, H, W, C], and the means over a picture of it and of `x`: [B, C], float32."""
    batch, height, width, channels = x.shape
    y = torch.empty_like(x)
    tiles = triton.cdiv(height, _tile(x)[0]) * triton.cdiv(width, COLUMNS)
    partials = [x.new_empty((tiles, batch, channels), dtype=torch.float32) for _ in range(2)]
    _launch(x, taps, bias, y, partials=partials)
    y_mean, x_mean = (add_partials(p, torch.float32) for p in partials)
    return y, y_mean, x_mean


def convolve_gelu_backward(
    x: Tensor, taps: Tensor, bias: Tensor, grad_y: Tensor | None, grad_y_mean: Tensor | None
) -> Tensor:
    """The gradient of the convolution's output, which GELU took: [B, H, W, C]; it is computed again from `x`.

    grad_y: [B, H, W, C], of GELU's output; grad_y_mean: [B, C], float32, of its mean. One of them may be None.
    """
    grad = torch.empty_like(x)
    _launch(x, taps, bias, grad, grad_y=grad_y, grad_y_mean=grad_y_mean)
    return grad


def _tile(x: Tensor) -> tuple[int, int, int]:
    """Rows and channels of a tile, and its warps."""
    batch, height, width, channels = x.shape
    if channels % 16 != 0:
        # Accesses are narrow, and 8 rows of addresses would spill.
        return 4, CHANNELS, 4
    programs = batch * triton.cdiv(height, 8) * triton.cdiv(width, COLUMNS) * triton.cdiv(channels, CHANNELS)
    return (8, CHANNELS, 4) if programs >= FEW_PROGRAMS else (8, CHANNELS // 2, 2)


def _launch(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    constant: Tensor | None = None,
    flipped: bool = False,
    partials: list[Tensor] | None = None,
    grad_y: Tensor | None = None,
    grad_y_mean: Tensor | None = None,
) -> None:
    if x.numel() == 0:
        return
    batch, height, width, channels = x.shape
    rows, tile_channels, warps = _tile(x)
    row_tiles, column_tiles = triton.cdiv(height, rows), triton.cdiv(width, COLUMNS)
    y_partials, x_partials = partials or (None, None)
    _convolve[(batch * row_tiles * column_tiles, triton.cdiv(channels, tile_channels))](
        x,
        taps,
        bias,
        constant,
        grad_y,
        grad_y_mean,
        y,
        y_partials,
        x_partials,
        batch,
        height,
        width,
        channels,
        taps.shape[1] * 48 if flipped else 0,
        -taps.shape[1] if flipped else taps.shape[1],
        row_tiles,
        column_tiles,
        1.0 / (height * width),
        rows,
        COLUMNS,
        tile_channels,
        num_warps=warps,
    )


@triton.jit(do_not_specialize=["batch", "height", "width", "row_tiles", "column_tiles"])
def _convolve(
    x,
    taps,
    bias,
    constant,
    grad_y,
    grad_y_mean,
    y,
    y_partials,
    x_partials,
    batch,
    height,
    width,
    channels,
    first_tap,
    next_tap,
    row_tiles,
    column_tiles,
    share,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Maps: [batch, height, width, channels], partials: [row_tiles * column_tiles, batch, channels]."""
    tile = tl.program_id(0)
    w = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    h = tile // column_tiles % row_tiles * ROWS
    b = (tile // (column_tiles * row_tiles)).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row_size = width.to(tl.int64) * channels
    corner = (b * height + h) * row_size

    sums = (tl.zeros((COLUMNS, CHANNELS), tl.float32),) * ROWS
    for dx in range(7):
        tap = taps + (first_tap + dx * next_tap) + c
        column_taps = ()
        for _ in tl.static_range(7):
            column_taps = column_taps + (tl.load(tap)[None, :],)
            tap += 7 * next_tap
        column = w + dx - 3
        mask = ((column >= 0) & (column < width))[:, None] & (c < channels)[None, :]
        # One pointer moves down the rows: an address for each row would cost registers that the loop keeps.
        row = x + (corner - 3 * row_size) + (column.to(tl.int64)[:, None] * channels + c[None, :])
        for i in tl.static_range(ROWS + 6):
            # Row 3 is the tile's first and so in the picture; those above it can only be outside at the top.
            if i < 3:
                inside = mask & (h + (i - 3) >= 0)
            elif i == 3:
                inside = mask
            else:
                inside = mask & (h + (i - 3) < height)
            value = to_float32(tl.load(row, mask=inside, other=0.0))
            row += row_size
            updated = ()
            for r in tl.static_range(ROWS):
                if i >= r and i < r + 7:
                    updated = updated + (tl.fma(value, column_taps[i - r], sums[r]),)
                else:
                    updated = updated + (sums[r],)
            sums = updated

    inside_c = c < channels
    mask = (w < width)[:, None] & inside_c[None, :]
    at = corner + (w.to(tl.int64)[:, None] * channels + c[None, :])
    added = tl.zeros((CHANNELS,), tl.float32)
    if bias is not None:
        added += tl.load(bias + c, mask=inside_c, other=0.0).to(tl.float32)
    if constant is not None:
        added += tl.load(constant + b * channels + c, mask=inside_c, other=0.0) * share
    if y_partials is not None:
        y_sum = tl.zeros((COLUMNS, CHANNELS), tl.float32)
        x_sum = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for r in tl.static_range(ROWS):
        inside = mask & (h + r < height)
        value = sums[r] + added[None, :]
        if y_partials is not None:
            value = gelu(value, y.dtype.element_ty)
            y_sum += tl.where(inside, value, 0.0)
            x_sum += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        elif grad_y is not None or grad_y_mean is not None:
            grad = tl.zeros((COLUMNS, CHANNELS), tl.float32)
            if grad_y is not None:
                grad += tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
            if grad_y_mean is not None:
                grad += (tl.load(grad_y_mean + b * channels + c, mask=inside_c, other=0.0) * share)[None, :]
            value = grad * gelu_derivative(value)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
        at += row_size
    if y_partials is not None:
        to = (tile % (column_tiles * row_tiles) * batch.to(tl.int64) + b) * channels + c
        tl.store(y_partials + to, tl.sum(y_sum, axis=0) * share, mask=inside_c)
        tl.store(x_partials + to, tl.sum(x_sum, axis=0) * share, mask=inside_c)


@triton.jit
def to_float32(x):
    """Exact. A bfloat16 is the upper half of its float32: in bits, each of a pair costs one instruction, not two."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)
