"""`add_norm` in Triton: a sum and its LayerNorm, forward and backward, over rows of C channels.

forward:   a program has one row of C = 1024 in registers (several narrow ones, up to `_FORWARD` elements), adds, rounds
           to the storage type, and takes two-pass statistics of what it rounded. Reads 2 and writes 2 elements a
           channel: 8 MB for the ViT's 1024 x 1024 tokens in 16 bits, where a sum and a LayerNorm apart move 10
backward:  a program takes a run of rows, `_BACKWARD` elements at a time, and keeps the sums over its rows in registers;
           `add_partials` adds those of the programs in order. Reads 3 and writes 1 element a channel, where LayerNorm's
           backward and a sum apart move 6. The gradient of either summand is the same tensor

9 FLOPs an element forward, 16 backward: bound by memory. Everything is computed in float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mra_kernels.triton._sums import add_partials

# Elements of a program at once; a longer row is one program's nevertheless.
_FORWARD, _BACKWARD = 1024, 4096
# Programs of the backward, and rows that each has at least: what it writes of sums is a small part of the rows' bytes.
_PROGRAMS, _LEAST_ROWS = 264, 8


def forward(
    x: Tensor, delta: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, delta: [..., C] -> sum, y: [..., C], mean, rstd: [...] in float32."""
    x, delta, norm_weight, norm_bias = map(Tensor.contiguous, (x, delta, norm_weight, norm_bias))
    total, y = x.new_empty(x.shape), x.new_empty(x.shape)
    mean = norm_weight.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = mean.new_empty(mean.shape)
    count, channels = mean.numel(), x.shape[-1]
    if count > 0:
        rows, block = _tile(channels, _FORWARD)
        _forward[(triton.cdiv(count, rows),)](
            x,
            delta,
            norm_weight,
            norm_bias,
            total,
            y,
            mean,
            rstd,
            count,
            channels,
            eps,
            rows,
            block,
            num_warps=_warps(rows * block, 8),
        )
    return total, y, mean, rstd


def backward(
    grad_sum: Tensor,
    grad_y: Tensor,
    total: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (and of delta), norm_weight and norm_bias; empty where `needs` says no."""
    grad_sum, grad_y, total, norm_weight = map(Tensor.contiguous, (grad_sum, grad_y, total, norm_weight))
    count, channels = mean.numel(), total.shape[-1]
    rows, block = _tile(channels, _BACKWARD)
    programs = min(_PROGRAMS, triton.cdiv(count, _LEAST_ROWS))
    grad_x = total.new_empty(total.shape) if needs[0] else None
    weight, bias = (mean.new_empty(programs, channels) if need else None for need in needs[1:])
    if count > 0 and any(needs):
        _backward[(programs,)](
            grad_sum,
            grad_y,
            total,
            norm_weight,
            mean,
            rstd,
            grad_x,
            weight,
            bias,
            count,
            triton.cdiv(count, programs),
            channels,
            rows,
            block,
            num_warps=_warps(rows * block, 16),
        )
    empty = total.new_empty(0)
    return (
        empty if grad_x is None else grad_x,
        empty if weight is None else add_partials(weight, norm_weight.dtype),
        empty if bias is None else add_partials(bias, norm_bias.dtype),
    )


def _tile(channels: int, elements: int) -> tuple[int, int]:
    """Rows and padded channels of a program at once."""
    block = triton.next_power_of_2(channels)
    return max(1, elements // block), block


def _warps(elements: int, each: int) -> int:
    """Warps whose lanes have `each` elements, as long as there may be so many."""
    return min(16, max(1, elements // (32 * each)))


@triton.jit(do_not_specialize=["count"])
def _forward(
    x,
    delta,
    norm_weight,
    norm_bias,
    total,
    y,
    mean,
    rstd,
    count,
    channels,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x, delta: [count, channels] -> total, y: [count, channels], mean, rstd: [count]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = column < channels
    mask = (row < count)[:, None] & there[None, :]
    at = row[:, None] * channels + column[None, :]
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + tl.load(delta + at, mask=mask, other=0.0).to(
        tl.float32
    )
    rounded = values.to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=mask)
    values = rounded.to(tl.float32)
    average = tl.sum(values, axis=1) / channels
    centered = tl.where(there[None, :], values - average[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered, axis=1) / channels + eps)
    weights = tl.load(norm_weight + column, mask=there, other=0.0).to(tl.float32)
    shifts = tl.load(norm_bias + column, mask=there, other=0.0).to(tl.float32)
    result = tl.fma(centered * scale[:, None], tl.broadcast_to(weights[None, :], (ROWS, BLOCK)), shifts[None, :])
    tl.store(y + at, result.to(y.dtype.element_ty), mask=mask)
    tl.store(mean + row, average, mask=row < count)
    tl.store(rstd + row, scale, mask=row < count)


@triton.jit(do_not_specialize=["count", "run"])
def _backward(
    grad_sum,
    grad_y,
    total,
    norm_weight,
    mean,
    rstd,
    grad_x,
    weight_partials,
    bias_partials,
    count,
    run,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of sum and y: [count, channels] -> grad_x, and partial sums: [programs, channels]; None is left out."""
    program = tl.program_id(0).to(tl.int64)
    first = program * run
    last = tl.minimum(first + run, count)
    column = tl.arange(0, BLOCK)
    there = column < channels
    weights = tl.load(norm_weight + column, mask=there, other=0.0).to(tl.float32)[None, :]
    weight_sums = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(first, last, ROWS):
        row = tl.cast(start, tl.int64) + tl.arange(0, ROWS)
        inside = row < last
        mask = inside[:, None] & there[None, :]
        at = row[:, None] * channels + column[None, :]
        grads = tl.load(grad_y + at, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
        average = tl.load(mean + row, mask=inside, other=0.0)
        scale = tl.load(rstd + row, mask=inside, other=0.0)[:, None]
        normal = tl.where(mask, (values - average[:, None]) * scale, 0.0)
        weight_sums += grads * normal
        bias_sums += grads
        if grad_x is not None:
            more = tl.load(grad_sum + at, mask=mask, other=0.0).to(tl.float32)
            grads = grads * weights
            level = (tl.sum(grads, axis=1) / channels)[:, None]
            slope = (tl.sum(grads * normal, axis=1) / channels)[:, None]
            result = more + (grads - level - normal * slope) * scale
            tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=mask)
    to = program * channels + column
    if weight_partials is not None:
        tl.store(weight_partials + to, tl.sum(weight_sums, axis=0), mask=there)
    if bias_partials is not None:
        tl.store(bias_partials + to, tl.sum(bias_sums, axis=0), mask=there)
