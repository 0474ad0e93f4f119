"""`gated_projection_add` in Triton: low + (l W_l^T + b_l) + gate * (h W_h^T + b_h), one gate a picture.

forward:   one product with K = K_l + K_h: the high path first, then the sums are gated and the low path goes on top of
           them, so that one set of accumulators is enough; bias and residual in the epilogue. 2 R N (K_l + K_h) FLOPs;
           reads l, h, low and both weights, writes y. Nothing between is stored.
           Where `_gemm.fuses` says no, as for float32: the library's two products, and a pass that adds them up.
backward:  U = grad W_h is the library's; h's gradient is gate * U, and the gate's is the sum of h U and of
           grad b_h, so that h W_h^T is not computed again. One pass over grad gates it for W_h's gradient and sums its
           columns over each picture, for both biases and the gate; one pass over h and U. Sums are two-stage, in order.

At 1024 pixels, one picture (R = 1024, N = 1024, K = 1024 + 1536), forward is 5.4 GFLOP: 7 us at 770 TFLOP/s; 13 MB.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mra_kernels.triton import _gemm, _product
from mra_kernels.triton._gemm import accumulate, halves, tile_at
from mra_kernels.triton._rows import strip, tile
from mra_kernels.triton._sums import add_partials


def forward(
    low: Tensor,
    low_hidden: Tensor,
    low_weight: Tensor,
    low_bias: Tensor,
    high_hidden: Tensor,
    high_weight: Tensor,
    high_bias: Tensor,
    gate: Tensor,
) -> Tensor:
    """low: [B, ..., N], hidden: [B, ..., K_l] and [B, ..., K_h], on one grid; gate: [B], float32 -> [B, ..., N]."""
    positions, shape = math.prod(low.shape[1:-1]), low.shape
    low, low_hidden, high_hidden = (_product.rows(t) for t in (low, low_hidden, high_hidden))
    low_weight, high_weight, low_bias, high_bias, gate = (
        t.contiguous() for t in (low_weight, high_weight, low_bias, high_bias, gate)
    )
    fused = _gemm.fuses("gated_projection_add", low_hidden, high_hidden, low_weight, high_weight)
    compute = _forward_fused if fused else _forward_library
    y = compute(low, low_hidden, high_hidden, low_weight, high_weight, low_bias, high_bias, gate, positions)
    return y.view(shape)


def _forward_fused(
    low: Tensor,
    low_hidden: Tensor,
    high_hidden: Tensor,
    low_weight: Tensor,
    high_weight: Tensor,
    low_bias: Tensor,
    high_bias: Tensor,
    gate: Tensor,
    positions: int,
) -> Tensor:
    """All contiguous: low: [R, N], hidden: [R, K], weights: [N, K] -> [R, N]."""
    y = torch.empty_like(low)
    operands = [(high_hidden, high_weight), (low_hidden, low_weight)]
    _gemm.launch(_project, operands, (low, low_bias, high_bias, gate, y, positions), y)
    return y


def _forward_library(
    low: Tensor,
    low_hidden: Tensor,
    high_hidden: Tensor,
    low_weight: Tensor,
    high_weight: Tensor,
    low_bias: Tensor,
    high_bias: Tensor,
    gate: Tensor,
    positions: int,
) -> Tensor:
    """The same by two products of the library and a pass that adds them up, in the memory of the first."""
    y = torch.addmm(low, low_hidden, low_weight.mT)
    if y.numel() > 0:
        count, channels = y.shape
        rows, columns = tile(channels)
        high = _product.linear(high_hidden, high_weight, high_bias)
        grid = (triton.cdiv(count, rows) * triton.cdiv(channels, columns),)
        _add_gated[grid](high, low_bias, gate, y, count, channels, positions, rows, columns)
    return y


def backward(
    grad_y: Tensor,
    low_hidden: Tensor,
    low_weight: Tensor,
    low_bias: Tensor,
    high_hidden: Tensor,
    high_weight: Tensor,
    high_bias: Tensor,
    gate: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of all inputs but `low`, whose gradient is `grad_y` itself; empty where `needs` says no."""
    need_low_bias, need_high, need_high_weight, need_high_bias, need_gate = needs[2:]
    empty = low_hidden.new_empty(0)
    positions, batch = math.prod(grad_y.shape[1:-1]), grad_y.shape[0]
    grad, gate, high_bias = _product.rows(grad_y), gate.contiguous(), high_bias.contiguous()
    grad_low, grad_low_weight = _product.gradients(grad, low_hidden, low_weight, needs[0], needs[1])

    gated, sums = _gate_and_sum(
        grad, gate, batch, positions, need_high_weight, need_low_bias or need_high_bias or need_gate
    )
    grad_high_weight = (
        _product.gradients(gated, high_hidden, high_weight, False, True)[1] if need_high_weight else empty
    )
    grad_low_bias, grad_high_bias = (
        t.new_empty(t.shape if need else 0) for t, need in ((low_bias, need_low_bias), (high_bias, need_high_bias))
    )
    if (need_low_bias or need_high_bias) and grad.shape[1] > 0:
        _add_pictures[(triton.cdiv(grad.shape[1], 128),)](
            sums,
            gate,
            grad_low_bias if need_low_bias else None,
            grad_high_bias if need_high_bias else None,
            batch,
            grad.shape[1],
            128,
        )

    grad_high, grad_gate = empty, gate.new_empty(gate.shape if need_gate else 0)
    if need_high or need_gate:
        product = grad @ high_weight
        partials = _gate_and_dot(product, high_hidden, gate, batch, positions, need_gate)
        grad_high = product.view(high_hidden.shape) if need_high else empty
        if need_gate and batch > 0:
            _add_gate[(batch,)](partials, sums, high_bias, grad_gate, partials.shape[1], grad.shape[1], 1024)
    return grad_low, grad_low_weight, grad_low_bias, grad_high, grad_high_weight, grad_high_bias, grad_gate


def _gate_and_sum(
    grad: Tensor, gate: Tensor, batch: int, positions: int, need_gated: bool, need_sums: bool
) -> tuple[Tensor, Tensor]:
    """grad: [B * L, N] -> gate * grad in its shape, and its sums over each picture: [B, N], float32."""
    channels = grad.shape[1]
    gated = torch.empty_like(grad) if need_gated else grad
    height = strip(positions, channels)
    strips = triton.cdiv(positions, height)
    partials = gate.new_empty(strips if need_sums else 0, batch, channels)
    if grad.numel() > 0 and (need_gated or need_sums):
        rows, columns = tile(channels)
        _scale_and_sum[(triton.cdiv(channels, columns), strips, batch)](
            grad,
            gate,
            gated if need_gated else None,
            partials if need_sums else None,
            positions,
            channels,
            height,
            rows,
            columns,
        )
    return gated, add_partials(partials, torch.float32)


def _gate_and_dot(
    product: Tensor, high_hidden: Tensor, gate: Tensor, batch: int, positions: int, need_dot: bool
) -> Tensor:
    """product: [B * L, K] becomes gate * product; its dot products with `high_hidden` in parts: [B, programs]."""
    depth = product.shape[1]
    height = strip(positions, depth)
    rows, columns = tile(depth)
    grid = (triton.cdiv(depth, columns), triton.cdiv(positions, height), batch)
    partials = gate.new_empty(batch, grid[0] * grid[1] if need_dot else 0)
    if product.numel() > 0:
        _scale_and_dot[grid](
            product,
            _product.rows(high_hidden),
            gate,
            partials if need_dot else None,
            positions,
            depth,
            height,
            rows,
            columns,
        )
    return partials


@triton.jit(do_not_specialize=["rows", "positions"])
def _project(
    high_hidden,
    high_weight,
    low_hidden,
    low_weight,
    low,
    low_bias,
    high_bias,
    gate,
    y,
    positions,
    rows,
    columns,
    high_depth,
    low_depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
):
    """hidden: [rows, depth], weights: [columns, depth], low: [rows, columns], gate: [rows / positions] -> y."""
    tiles = tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS)
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        top, left = tile_at(index, rows, columns, ROWS, COLUMNS, GROUP)
        row = top + tl.arange(0, ROWS)
        column = left + tl.arange(0, COLUMNS)
        gates = tl.load(gate + row // positions, mask=row < rows, other=0.0)
        bias = tl.load(high_bias + column, mask=column < columns, other=0.0).to(tl.float32)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        sums = accumulate(
            sums, high_hidden, high_weight, top, left, rows, columns, high_depth, ROWS, COLUMNS, DEPTH, TMA
        )
        sums = (sums + bias[None, :]) * gates[:, None]
        sums = accumulate(sums, low_hidden, low_weight, top, left, rows, columns, low_depth, ROWS, COLUMNS, DEPTH, TMA)
        first, second = halves(sums, ROWS, COLUMNS)
        _add_low(first, low, low_bias, y, row, left, rows, columns, COLUMNS // 2)
        _add_low(second, low, low_bias, y, row, left + COLUMNS // 2, rows, columns, COLUMNS // 2)


@triton.jit
def _add_low(sums, low, low_bias, y, row, left, rows, columns, COLUMNS: tl.constexpr):
    """Stores sums + low_bias + low into y: [rows, columns], at rows `row` and columns from `left` on."""
    column = left + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    bias = tl.load(low_bias + column, mask=column < columns, other=0.0).to(tl.float32)
    value = sums + bias[None, :] + tl.load(low + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count", "positions"])
def _add_gated(high, low_bias, gate, y, count, channels, positions, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """high: [count, channels], gate: [count / positions]; y: [count, channels] becomes y + low_bias + gate * high."""
    across = tl.cdiv(channels, COLUMNS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < count)[:, None] & (column < channels)[None, :]
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    gates = tl.load(gate + row // positions, mask=row < count, other=0.0)[:, None]
    base = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    base += tl.load(low_bias + column, mask=column < channels, other=0.0).to(tl.float32)[None, :]
    value = tl.fma(gates, tl.load(high + at, mask=mask, other=0.0).to(tl.float32), base)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["positions", "height"])
def _scale_and_sum(grad, gate, gated, partials, positions, channels, height, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """grad: [B, positions, channels] -> gated in its shape, partials: [strips, B, channels]; None is not computed."""
    picture = tl.program_id(2)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    factor = tl.load(gate + picture)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, height, ROWS):
        row = tl.program_id(1) * height + first + tl.arange(0, ROWS)
        mask = (row < positions)[:, None] & inside[None, :]
        at = (picture.to(tl.int64) * positions + row)[:, None] * channels + column[None, :]
        value = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        if gated is not None:
            tl.store(gated + at, (factor * value).to(gated.dtype.element_ty), mask=mask)
        sums += value
    if partials is not None:
        to = partials + (tl.program_id(1) * tl.num_programs(2) + picture).to(tl.int64) * channels + column
        tl.store(to, tl.sum(sums, axis=0), mask=inside)


@triton.jit(do_not_specialize=["positions", "height"])
def _scale_and_dot(
    product, hidden, gate, partials, positions, depth, height, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """product: [B, positions, depth] becomes gate * product; partials: [B, programs] its dot products with hidden."""
    picture = tl.program_id(2)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    factor = tl.load(gate + picture)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, height, ROWS):
        row = tl.program_id(1) * height + first + tl.arange(0, ROWS)
        mask = (row < positions)[:, None] & (column < depth)[None, :]
        at = (picture.to(tl.int64) * positions + row)[:, None] * depth + column[None, :]
        value = tl.load(product + at, mask=mask, other=0.0).to(tl.float32)
        if partials is not None:
            sums = tl.fma(value, tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32), sums)
        tl.store(product + at, (factor * value).to(product.dtype.element_ty), mask=mask)
    if partials is not None:
        program = (picture * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        tl.store(partials + program, tl.sum(tl.sum(sums, axis=1), axis=0))


@triton.jit(do_not_specialize=["batch"])
def _add_pictures(sums, gate, grad_low_bias, grad_high_bias, batch, channels, COLUMNS: tl.constexpr):
    """sums: [batch, channels] -> grad_low_bias, their sum, and grad_high_bias, their sum weighted by the gates."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    low = tl.zeros((COLUMNS,), tl.float32)
    high = tl.zeros((COLUMNS,), tl.float32)
    for picture in range(batch):
        value = tl.load(sums + picture * channels + column, mask=inside, other=0.0)
        low += value
        high = tl.fma(value, tl.load(gate + picture), high)
    if grad_low_bias is not None:
        tl.store(grad_low_bias + column, low.to(grad_low_bias.dtype.element_ty), mask=inside)
    if grad_high_bias is not None:
        tl.store(grad_high_bias + column, high.to(grad_high_bias.dtype.element_ty), mask=inside)


@triton.jit
def _add_gate(partials, sums, high_bias, grad_gate, programs, channels, BLOCK: tl.constexpr):
    """partials: [B, programs], sums: [B, channels], high_bias: [channels] -> grad_gate: [B]."""
    picture = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, programs, BLOCK):
        at = first + lane
        total += tl.load(partials + picture * programs + at, mask=at < programs, other=0.0)
    for first in range(0, channels, BLOCK):
        at = first + lane
        bias = tl.load(high_bias + at, mask=at < channels, other=0.0).to(tl.float32)
        total = tl.fma(bias, tl.load(sums + picture * channels + at, mask=at < channels, other=0.0), total)
    tl.store(grad_gate + picture, tl.sum(total, axis=0))
