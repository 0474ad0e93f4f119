"""`gated_resample_add` in Triton: low + gate * resample(high), by average pooling, on the same grid, or bilinear.

Work: a program owns 16 pixels of a row and 64 channels, 16 bytes of bfloat16 a thread. Fused: the resampling, the gate
and the sum. Bytes, on one grid: 3 * C elements a pixel; 2 FLOPs an element: bound by memory.

Backward gathers: each high-resolution pixel sums the low-resolution pixels that read it, so nothing is atomic. The
gate's gradient is summed by one program for each row of the low grid, then over the rows in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mra_kernels.triton._sums import add_partials

PIXELS, CHANNELS, WARPS = 16, 64, 4
# Of the gate's gradient: there are as few programs as rows.
GATE_PIXELS, GATE_CHANNELS, GATE_WARPS = 16, 128, 8
SAME, POOL, BILINEAR = 0, 1, 2


def forward(low: Tensor, high: Tensor, gate: Tensor) -> Tensor:
    """low: [B, H, W, C], high: [B, H', W', C], gate: [B] -> [B, H, W, C]."""
    low, high, gate = low.contiguous(), high.contiguous(), gate.contiguous()
    y = torch.empty_like(low)
    if y.numel() > 0:
        _forward[_grid(low)](
            low, high, gate, y, *_sizes(low, high), mode_of(low, high), PIXELS, CHANNELS, num_warps=WARPS
        )
    return y


def backward(grad_y: Tensor, high: Tensor, gate: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Gradients of high: [B, H', W', C] and gate: [B]; empty where `needs` says no."""
    grad_y, high, gate = grad_y.contiguous(), high.contiguous(), gate.contiguous()
    grad_high, grad_gate = high.new_empty(0), gate.new_empty(0)
    sizes, mode = _sizes(grad_y, high), mode_of(grad_y, high)
    if needs[0]:
        grad_high = torch.empty_like(high)
        if high.numel() > 0:
            readers = [_readers(low, source) for low, source in zip(grad_y.shape[1:3], high.shape[1:3], strict=True)]
            _high_gradient[_grid(high)](
                grad_y, gate, grad_high, *sizes, *readers[0], *readers[1], mode, PIXELS, CHANNELS, num_warps=WARPS
            )
    if needs[1]:
        batch, height = grad_y.shape[:2]
        partials = gate.new_empty((height, batch))
        if partials.numel() > 0:
            _gate_partials[(batch * height,)](
                grad_y, high, partials, batch, *sizes, mode, GATE_PIXELS, GATE_CHANNELS, num_warps=GATE_WARPS
            )
        grad_gate = add_partials(partials, gate.dtype)
    return grad_high, grad_gate


def mode_of(low: Tensor, high: Tensor) -> int:
    """How `high`: [B, H', W', C] comes to the grid of `low`: [B, H, W, C]."""
    if low.shape[1:3] == high.shape[1:3]:
        return SAME
    return POOL if all(h % n == 0 for h, n in zip(high.shape[1:3], low.shape[1:3], strict=True)) else BILINEAR


def _grid(x: Tensor) -> tuple[int, int]:
    batch, height, width, channels = x.shape
    return batch * height * triton.cdiv(width, PIXELS), triton.cdiv(channels, CHANNELS)


def _sizes(low: Tensor, high: Tensor) -> tuple[int, int, int, int, int, float, float]:
    """Height and width of both grids, channels, and source steps a target of both axes."""
    (_, height, width, channels), (high_height, high_width) = low.shape, high.shape[1:3]
    return height, width, high_height, high_width, channels, _scale(height, high_height), _scale(width, high_width)


def _scale(size: int, source: int) -> float:
    return (source - 1) / (size - 1) if size > 1 else 0.0


def _readers(size: int, source: int) -> tuple[float, int]:
    """Targets between two source points, and how many, from `_first_reader` on, may read one point."""
    scale = _scale(size, source)
    return (1 / scale, min(size, int(2 / scale) + 4)) if scale > 0 else (0.0, size)


@triton.jit
def _bilinear(target, source, scale):
    """The two points of an axis that `target` reads: corners aligned, (1 - fraction) * first + fraction * second."""
    position = target * scale
    first = tl.minimum(position.to(tl.int32), source - 1)
    return first, tl.minimum(first + 1, source - 1), position - first.to(tl.float32)


@triton.jit
def _bilinear_weight(target, index, source, scale):
    """The weight with which `target` reads `index`; 0 if it does not."""
    first, second, fraction = _bilinear(target, source, scale)
    return tl.where(first == index, 1.0 - fraction, 0.0) + tl.where(second == index, fraction, 0.0)


@triton.jit
def _first_reader(index, step):
    """No target in front of it reads `index`: one step of the source before that, and one more against rounding."""
    return tl.maximum(((index - 1) * step).to(tl.int32) - 1, 0)


@triton.jit
def _load(high, rows, y, x, width, channels, c, mask):
    """High-resolution pixels (y, x): [PIXELS], of the picture whose first row is number `rows`."""
    at = ((rows + y) * width + x).to(tl.int64)[:, None] * channels + c[None, :]
    return tl.load(high + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _resample(
    high, b, y, x, c, mask, height, width, high_height, high_width, channels, scale_y, scale_x, MODE: tl.constexpr
):
    """What pixels (b, y, x) of the low grid see; b, y: scalars, x: [PIXELS], c: [CHANNELS]."""
    rows = b * high_height
    if MODE == 0:
        total = _load(high, rows, y, x, high_width, channels, c, mask)
    elif MODE == 1:
        window_y = high_height // height
        window_x = high_width // width
        total = tl.zeros(mask.shape, tl.float32)
        for i in range(window_y):
            for j in range(window_x):
                total += _load(high, rows, y * window_y + i, x * window_x + j, high_width, channels, c, mask)
        total *= 1.0 / (window_y * window_x)
    else:
        top, bottom, down = _bilinear(y, high_height, scale_y)
        left, right, along = _bilinear(x, high_width, scale_x)
        along = along[:, None]
        total = (1.0 - down) * (1.0 - along) * _load(high, rows, top, left, high_width, channels, c, mask)
        total += (1.0 - down) * along * _load(high, rows, top, right, high_width, channels, c, mask)
        total += down * (1.0 - along) * _load(high, rows, bottom, left, high_width, channels, c, mask)
        total += down * along * _load(high, rows, bottom, right, high_width, channels, c, mask)
    return total


@triton.jit(do_not_specialize=["height", "width", "high_height", "high_width"])
def _forward(
    low,
    high,
    gate,
    y,
    height,
    width,
    high_height,
    high_width,
    channels,
    scale_y,
    scale_x,
    MODE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """low, y: [B, height, width, channels], high: [B, high_height, high_width, channels], gate: [B]."""
    tiles = tl.cdiv(width, PIXELS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b = row // height
    x = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (x < width)[:, None] & (c < channels)[None, :]
    at = (row * width + x)[:, None] * channels + c[None, :]
    seen = _resample(
        high, b, row % height, x, c, mask, height, width, high_height, high_width, channels, scale_y, scale_x, MODE
    )
    value = tl.fma(tl.load(gate + b), seen, tl.load(low + at, mask=mask, other=0.0).to(tl.float32))
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["height", "width", "high_height", "high_width", "count_y", "count_x"])
def _high_gradient(
    grad_y,
    gate,
    grad_high,
    height,
    width,
    high_height,
    high_width,
    channels,
    scale_y,
    scale_x,
    step_y,
    count_y,
    step_x,
    count_x,
    MODE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """grad_y: [B, height, width, channels] -> grad_high: [B, high_height, high_width, channels]."""
    tiles = tl.cdiv(high_width, PIXELS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b = row // high_height
    y = row % high_height
    x = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (x < high_width)[:, None] & (c < channels)[None, :]
    rows = b * height
    factor = tl.load(gate + b)
    if MODE == 2:
        total = tl.zeros((PIXELS, CHANNELS), tl.float32)
        first_y = _first_reader(y, step_y)
        first_x = _first_reader(x, step_x)
        for p in range(first_y, tl.minimum(first_y + count_y, height)):
            weight_y = _bilinear_weight(p, y, high_height, scale_y)
            for i in range(count_x):
                q = first_x + i
                weight = weight_y * _bilinear_weight(q, x, high_width, scale_x)
                # A reader with weight zero must not bring in its NaN.
                reads = mask & ((q < width) & (weight != 0.0))[:, None]
                total += (factor * weight)[:, None] * _load(grad_y, rows, p, q, width, channels, c, reads)
    else:
        window_y = high_height // height
        window_x = high_width // width
        read = _load(grad_y, rows, y // window_y, x // window_x, width, channels, c, mask)
        total = factor / (window_y * window_x) * read
    to = (row * high_width + x)[:, None] * channels + c[None, :]
    tl.store(grad_high + to, total.to(grad_high.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "height", "width", "high_height", "high_width"])
def _gate_partials(
    grad_y,
    high,
    partials,
    batch,
    height,
    width,
    high_height,
    high_width,
    channels,
    scale_y,
    scale_x,
    MODE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """partials: [height, batch]: each row's sum of grad_y * resample(high)."""
    row = tl.program_id(0).to(tl.int64)
    b = row // height
    y = row % height
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for start in range(0, width, PIXELS):
        x = start + tl.arange(0, PIXELS)
        for first in range(0, channels, CHANNELS):
            c = first + tl.arange(0, CHANNELS)
            mask = (x < width)[:, None] & (c < channels)[None, :]
            at = (row * width + x)[:, None] * channels + c[None, :]
            grad = tl.load(grad_y + at, mask=mask, other=0.0).to(tl.float32)
            seen = _resample(
                high, b, y, x, c, mask, height, width, high_height, high_width, channels, scale_y, scale_x, MODE
            )
            total = tl.fma(grad, seen, total)
    tl.store(partials + y * batch + b, tl.sum(tl.sum(total, axis=1), axis=0))
