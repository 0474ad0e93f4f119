"""Gradients of a depthwise 7x7 convolution's weight and bias.

Work: a program is one warp with 16 channels and 4 columns at a time, so a thread has two channels, whose 49 float32
sums it keeps for a whole share of the batch. It marches down the rows of `x`: seven shifted loads of a row meet the
seven rows of the gradient around it, of which the last six stay in registers. Columns of a warp meet at the end, by
shuffles; programs meet in `add_partials`, in a fixed order.

Bytes: both maps once from memory; the halo, 10 / 4 columns of `x`, comes from the caches; about 10 MB of partial sums.
FLOPs: 98 an element, bound by the issue of FMAs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mra_kernels.triton._depthwise import to_float32
from mra_kernels.triton._sums import add_partials

COLUMNS, CHANNELS, ROWS = 4, 16, 2
# Warps that fill 132 SMs: about 14 fit on one.
PROGRAMS = 3072
# Rows of a task at least: six rows of the gradient are loaded in front of them.
TASK_ROWS = 16


def parameter_gradients(x: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the weight: [C, 1, 7, 7], and of the bias: [C], in the dtype of `weight`.

    x, grad: [B, H, W, C], contiguous: the convolution's input and the gradient of its output.
    """
    batch, height, width, channels = x.shape
    blocks, strips = triton.cdiv(channels, CHANNELS), triton.cdiv(width, COLUMNS)
    # Tasks are strips of columns, cut into pieces where a batch has too few; a program has several where it has many.
    pieces = max(1, min(triton.cdiv(height, TASK_ROWS), PROGRAMS // max(1, blocks * strips * batch)))
    piece_rows = triton.cdiv(triton.cdiv(height, pieces), ROWS) * ROWS
    pieces = triton.cdiv(height, piece_rows)
    tasks = batch * strips * pieces
    steps = triton.cdiv(tasks, max(1, PROGRAMS // blocks))
    programs = triton.cdiv(tasks, max(1, steps))
    weight_partials = x.new_empty((programs, channels, 49), dtype=torch.float32)
    bias_partials = x.new_empty((programs, channels), dtype=torch.float32)
    if programs > 0:
        _parameter_gradients[(programs, blocks)](
            x,
            grad,
            weight_partials,
            bias_partials,
            tasks,
            steps,
            pieces,
            piece_rows,
            strips,
            height,
            width,
            channels,
            ROWS,
            COLUMNS,
            CHANNELS,
            num_warps=1,
        )
    return add_partials(weight_partials, weight.dtype).view(weight.shape), add_partials(bias_partials, weight.dtype)


@triton.jit(do_not_specialize=["tasks", "steps", "pieces", "piece_rows", "strips", "height", "width"])
def _parameter_gradients(
    x,
    grad,
    weight_partials,
    bias_partials,
    tasks,
    steps,
    pieces,
    piece_rows,
    strips,
    height,
    width,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Maps: [batch, height, width, channels], partials: [programs, channels, 49] and [programs, channels]."""
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside_c = (c < channels)[None, :]
    row_size = width.to(tl.int64) * channels
    zero = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    # sums[dx * 7 + dy]
    sums = (zero,) * 49
    bias_sum = zero
    first = tl.program_id(0) * steps
    for task in range(first, tl.minimum(first + steps, tasks)):
        top = task % pieces * piece_rows
        bottom = tl.minimum(top + piece_rows, height)
        w = task // pieces % strips * COLUMNS + tl.arange(0, COLUMNS)
        picture = (task // (pieces * strips)).to(tl.int64) * height * row_size
        lane = w.to(tl.int64)[:, None] * channels + c[None, :]
        inside = (w < width)[:, None] & inside_c
        # The rows of the gradient from h - 3 to h + 2; h + 3 and what follows is loaded beside row h of x.
        grads = ()
        for i in tl.static_range(6):
            h = top + i - 3
            mask = inside & (h >= 0) & (h < height)
            grads = grads + (to_float32(tl.load(grad + picture + h * row_size + lane, mask=mask, other=0.0)),)
        x_row = x + picture + top * row_size + lane
        grad_row = grad + picture + (top + 3) * row_size + lane
        for h in range(top, bottom, ROWS):
            for i in tl.static_range(ROWS):
                mask = inside & (h + (i + 3) < height)
                grads = grads + (to_float32(tl.load(grad_row, mask=mask, other=0.0)),)
                grad_row += row_size
            for i in tl.static_range(ROWS):
                here = h + i < bottom
                bias_sum += tl.where(here, grads[i + 3], 0.0)
                for dx in tl.static_range(7):
                    column = w + (dx - 3)
                    mask = ((column >= 0) & (column < width))[:, None] & inside_c & here
                    value = to_float32(tl.load(x_row + (dx - 3) * channels, mask=mask, other=0.0))
                    updated = sums[: dx * 7]
                    for dy in tl.static_range(7):
                        # Row h of x meets tap dy at row h - (dy - 3) of the gradient.
                        updated = updated + (tl.fma(value, grads[i + 6 - dy], sums[dx * 7 + dy]),)
                    sums = updated + sums[dx * 7 + 7 :]
                x_row += row_size
            grads = grads[ROWS:]

    inside_c = c < channels
    to = tl.program_id(0).to(tl.int64) * channels + c
    tl.store(bias_partials + to, tl.sum(bias_sum, axis=0), mask=inside_c)
    for dx in tl.static_range(7):
        for dy in tl.static_range(7):
            tl.store(weight_partials + to * 49 + (dy * 7 + dx), tl.sum(sums[dx * 7 + dy], axis=0), mask=inside_c)
