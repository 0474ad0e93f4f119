"""`linear_gelu` in Triton: GELU(x W^T + b), exact erf, and a weighted mean of it over each picture's positions.

The product is the library's, with the bias in its epilogue, because a product that is a tenth slower costs more than a
fused GELU saves; what is left is one pass over [R, N], with about 20 instructions an element in 16 bits. The fused
product, which `_gemm.FUSED` chooses, is for calls without a mean.

forward:   reads the product and writes y, in the product's memory where backward does not need it: 2 R N elements.
           The mean is a sum over strips of positions, added in a second launch, in order.
backward:  reads the product and the gradient of y, writes the gradient of the product: 3 R N elements. The bias
           gradient is a sum over strips of the same rows, added in a second launch, in order. The gradients of x and W
           are the library's products.

At stage 1 of ConvNeXt-L, one picture of 1024 (R = 65536, N = 768, bfloat16), the pass moves 201 MB forward and 302 MB
backward: 47 and 70 us at 4.3 TB/s.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mra_kernels.triton import _gemm, _product
from mra_kernels.triton._gelu import gelu, gelu_derivative
from mra_kernels.triton._gemm import accumulate, halves, tile_at
from mra_kernels.triton._rows import strip, tile
from mra_kernels.triton._sums import add_partials

# Elements of a program without a mean.
_BLOCK = 4096


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, mean_weights: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x: [B, ..., K] -> y: [B, ..., N], its weighted means [B, N], float32, and the product [B, ..., N].

    Without `mean_weights` there are no means; the product is empty unless `keep` wants it for backward.
    """
    y_mean = x.new_empty(0)
    shape = (*x.shape[:-1], weight.shape[0])
    if mean_weights is None and _gemm.fuses("linear_gelu", rows := _product.rows(x), weight := weight.contiguous()):
        y, product = _forward_fused(rows, weight, bias.contiguous(), keep)
        return y.view(shape), y_mean, product.view(shape) if keep else product
    product = _product.linear(x, weight, bias)
    y = torch.empty_like(product) if keep else product
    if mean_weights is not None:
        y_mean = _activate_and_average(product, y, mean_weights.contiguous(), x.shape[0])
    elif y.numel() > 0:
        _activate[(triton.cdiv(y.numel(), _BLOCK),)](product, y, y.numel(), _BLOCK, num_warps=8)
    return y.view(shape), y_mean, product.view(shape) if keep else x.new_empty(0)


def backward(
    grad_y: Tensor | None,
    grad_y_mean: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean_weights: Tensor | None,
    product: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight and bias; empty where `needs` says no. A product that was not kept is computed again."""
    product = _product.linear(x, weight, bias) if product.numel() == 0 else _product.rows(product)
    count, channels = product.shape
    given = [None if t is None else t.contiguous() for t in (grad_y, grad_y_mean, mean_weights)]
    grad = torch.empty_like(product)
    height = strip(count, channels)
    strips = triton.cdiv(count, height)
    partials = product.new_empty(strips, channels, dtype=torch.float32) if needs[2] else None
    if product.numel() > 0:
        grid = (triton.cdiv(channels, tile(channels)[1]), strips)
        positions = math.prod(x.shape[1:-1])
        _backward[grid](product, *given, grad, partials, count, positions, channels, height, *tile(channels))
    grad_bias = x.new_empty(0) if partials is None else add_partials(partials, bias.dtype)
    return *_product.gradients(grad, x, weight, needs[0], needs[1]), grad_bias


def _forward_fused(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """x: [R, K], weight: [N, K], contiguous -> y: [R, N], and the product: [R, N] or empty."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    product = x.new_empty(y.shape if keep else 0)
    _gemm.launch(_project, [(x, weight)], (bias, product if keep else None, y), y)
    return y, product


def _activate_and_average(product: Tensor, y: Tensor, mean_weights: Tensor, batch: int) -> Tensor:
    """Writes GELU of the product into y: [batch * L, N]; returns its means weighted by mean_weights: [batch, N]."""
    positions, channels = mean_weights.numel(), y.shape[1]
    height = strip(positions, channels)
    strips = triton.cdiv(positions, height)
    partials = y.new_empty(strips, batch, channels, dtype=torch.float32)
    if partials.numel() > 0:
        grid = (triton.cdiv(channels, tile(channels)[1]), strips, batch)
        _activate_rows[grid](product, y, mean_weights, partials, positions, channels, height, *tile(channels))
    return add_partials(partials, torch.float32)


@triton.jit(do_not_specialize=["rows"])
def _project(
    x,
    weight,
    bias,
    product,
    y,
    rows,
    columns,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
):
    """x: [rows, depth], weight: [columns, depth] -> y and, unless it is None, product: [rows, columns]."""
    tiles = tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS)
    # Flattened, the loads of the next tile begin before this one's epilogue ends.
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        top, left = tile_at(index, rows, columns, ROWS, COLUMNS, GROUP)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        sums = accumulate(sums, x, weight, top, left, rows, columns, depth, ROWS, COLUMNS, DEPTH, TMA)
        row = top + tl.arange(0, ROWS)
        first, second = halves(sums, ROWS, COLUMNS)
        _store(first, bias, product, y, row, left, rows, columns, COLUMNS // 2)
        _store(second, bias, product, y, row, left + COLUMNS // 2, rows, columns, COLUMNS // 2)


@triton.jit
def _store(sums, bias, product, y, row, left, rows, columns, COLUMNS: tl.constexpr):
    """Stores sums + bias into product, and GELU of it into y, at rows `row` and columns from `left` on."""
    column = left + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    value = sums + tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if product is not None:
        tl.store(product + at, value.to(product.dtype.element_ty), mask=mask)
    tl.store(y + at, gelu(value, y.dtype.element_ty).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _activate(product, y, count, BLOCK: tl.constexpr):
    """product: [count] -> y: [count]; they may be the same memory."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(product + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y + at, gelu(x, y.dtype.element_ty).to(y.dtype.element_ty), mask=at < count)


@triton.jit(do_not_specialize=["positions", "height"])
def _activate_rows(
    product, y, mean_weights, partials, positions, channels, height, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """product: [B, positions, channels] -> y in its shape, partials: [strips, B, channels]; strips of `height` rows."""
    picture = tl.program_id(2)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, height, ROWS):
        row = tl.program_id(1) * height + first + tl.arange(0, ROWS)
        mask = (row < positions)[:, None] & inside[None, :]
        at = (picture.to(tl.int64) * positions + row)[:, None] * channels + column[None, :]
        value = tl.load(product + at, mask=mask, other=0.0).to(tl.float32)
        value = gelu(value, y.dtype.element_ty).to(y.dtype.element_ty)
        tl.store(y + at, value, mask=mask)
        weights = tl.load(mean_weights + row, mask=row < positions, other=0.0)
        # The mean of y as it is stored, since that is what a reader of y averages.
        sums = tl.fma(value.to(tl.float32), weights[:, None], sums)
    to = partials + (tl.program_id(1) * tl.num_programs(2) + picture).to(tl.int64) * channels + column
    tl.store(to, tl.sum(sums, axis=0), mask=inside)


@triton.jit(do_not_specialize=["count", "positions", "height"])
def _backward(
    product,
    grad_y,
    grad_y_mean,
    mean_weights,
    grad,
    partials,
    count,
    positions,
    channels,
    height,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """product: [count, channels] -> grad in its shape, and its sums over strips of `height` rows in partials.

    grad_y: [count, channels], or None for zeros; grad_y_mean: [B, channels] with mean_weights: [positions], or None.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, height, ROWS):
        row = tl.program_id(1) * height + first + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * channels + column[None, :]
        grad_output = tl.zeros((ROWS, COLUMNS), tl.float32)
        if grad_y is not None:
            grad_output += tl.load(grad_y + at, mask=mask, other=0.0).to(tl.float32)
        if mean_weights is not None and grad_y_mean is not None:
            weights = tl.load(mean_weights + row % positions, mask=row < count, other=0.0)
            of_picture = grad_y_mean + (row // positions)[:, None] * channels + column[None, :]
            grad_output = tl.fma(weights[:, None], tl.load(of_picture, mask=mask, other=0.0), grad_output)
        value = grad_output * gelu_derivative(tl.load(product + at, mask=mask, other=0.0).to(tl.float32))
        tl.store(grad + at, value.to(grad.dtype.element_ty), mask=mask)
        sums += value
    if partials is not None:
        tl.store(partials + tl.program_id(1) * channels + column, tl.sum(sums, axis=0), mask=inside)
