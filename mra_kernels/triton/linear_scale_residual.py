"""`linear_scale_residual` in Triton: residual + scale * (x W^T + b).

The product is the library's, with the bias in its epilogue, unless `_gemm.FUSED` chooses the fused one; what is left is
one pass over [R, N]:

forward:   reads the product and the residual, writes y, in the product's memory where backward does not need it:
           3 R N elements, an FMA each.
backward:  reads the gradient of y, and the product where the scale's gradient is wanted; writes the gradient scaled.
           The gradients of bias and scale are sums over strips of the same rows, added in a second launch, in order.
           The gradients of x and W are the library's products.

At stage 1 of ConvNeXt-L, one picture of 1024 (R = 65536, N = 192, bfloat16), either pass moves
75 MB: 18 us at 4.3 TB/s.
"""

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
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, residual: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """x: [..., K], weight: [N, K], scale: [N] or None, residual: [..., N] -> y: [..., N], and the product [..., N].

    The product is empty unless `keep` wants it for the scale's gradient.
    """
    kept = keep and scale is not None
    scale = None if scale is None else scale.contiguous()
    if _gemm.fuses("linear_scale_residual", rows := _product.rows(x), weight := weight.contiguous()):
        base = _product.rows(residual)
        y, product = torch.empty_like(base), x.new_empty(residual.shape if kept else 0)
        others = (bias.contiguous(), scale, base, product if kept else None, y)
        _gemm.launch(_project, [(rows, weight)], others, y)
        return y.view(residual.shape), product
    product = _product.linear(x, weight, bias)
    y = torch.empty_like(product) if kept else product
    if y.numel() > 0:
        count, channels = y.shape
        height, width = tile(channels)
        grid = (triton.cdiv(count, height) * triton.cdiv(channels, width),)
        _scale_add[grid](product, scale, _product.rows(residual), y, count, channels, height, width)
    return y.view(residual.shape), product.view(residual.shape) if kept else x.new_empty(0)


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    product: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias and scale; empty where `needs` says no. A product not kept is computed again."""
    need_scale = needs[3] and scale is not None
    grad_y = _product.rows(grad_y)
    scaled = grad_y if scale is None else torch.empty_like(grad_y)
    count, channels = grad_y.shape
    height = strip(count, channels)
    strips = triton.cdiv(count, height)
    bias_partials, scale_partials = (
        grad_y.new_empty(strips, channels, dtype=torch.float32) if need else None for need in (needs[2], need_scale)
    )
    if grad_y.numel() > 0 and (scale is not None or needs[2]):
        if need_scale:
            product = _product.linear(x, weight, bias) if product.numel() == 0 else _product.rows(product)
        _backward[(triton.cdiv(channels, tile(channels)[1]), strips)](
            grad_y,
            None if scale is None else scale.contiguous(),
            product if need_scale else None,
            None if scale is None else scaled,
            bias_partials,
            scale_partials,
            count,
            channels,
            height,
            *tile(channels),
        )
    sums = [x.new_empty(0) if p is None else add_partials(p, bias.dtype) for p in (bias_partials, scale_partials)]
    return *_product.gradients(scaled, x, weight, needs[0], needs[1]), *sums


@triton.jit(do_not_specialize=["rows"])
def _project(
    x,
    weight,
    bias,
    scale,
    residual,
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
    """x: [rows, depth], weight: [columns, depth], scale: [columns] or None, residual: [rows, columns] -> y, product."""
    tiles = tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS)
    # Flattened, the loads of the next tile begin before this one's epilogue ends.
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        top, left = tile_at(index, rows, columns, ROWS, COLUMNS, GROUP)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        sums = accumulate(sums, x, weight, top, left, rows, columns, depth, ROWS, COLUMNS, DEPTH, TMA)
        row = top + tl.arange(0, ROWS)
        first, second = halves(sums, ROWS, COLUMNS)
        _store(first, bias, scale, residual, product, y, row, left, rows, columns, COLUMNS // 2)
        _store(second, bias, scale, residual, product, y, row, left + COLUMNS // 2, rows, columns, COLUMNS // 2)


@triton.jit
def _store(sums, bias, scale, residual, product, y, row, left, rows, columns, COLUMNS: tl.constexpr):
    """Stores p = sums + bias into product, and residual + scale * p into y, at columns from `left` on."""
    column = left + tl.arange(0, COLUMNS)
    inside = column < columns
    mask = (row < rows)[:, None] & inside[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    value = sums + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if product is not None:
        tl.store(product + at, value.to(product.dtype.element_ty), mask=mask)
    if scale is not None:
        value *= tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _scale_add(product, scale, residual, y, count, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """product, residual: [count, channels], scale: [channels] or None -> y, which may be the product's memory."""
    across = tl.cdiv(channels, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < count)[:, None] & (column < channels)[None, :]
    at = row[:, None] * channels + column[None, :]
    value = tl.load(product + at, mask=mask, other=0.0).to(tl.float32)
    base = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if scale is not None:
        factor = tl.load(scale + column, mask=column < channels, other=0.0).to(tl.float32)
        value = tl.fma(value, factor[None, :], base)
    else:
        value += base
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count", "height"])
def _backward(
    grad_y,
    scale,
    product,
    scaled,
    bias_partials,
    scale_partials,
    count,
    channels,
    height,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """grad_y, product: [count, channels], scale: [channels] -> scaled, and sums over strips of `height` rows.

    scaled = scale * grad_y; bias_partials sum it, scale_partials sum product * grad_y. What is None is not computed.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    factor = tl.full((COLUMNS,), 1.0, tl.float32)
    if scale is not None:
        factor = tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    bias_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    scale_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, height, ROWS):
        row = tl.program_id(1) * height + first + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * channels + column[None, :]
        grad = tl.load(grad_y + at, mask=mask, other=0.0).to(tl.float32)
        if scaled is not None:
            tl.store(scaled + at, (grad * factor[None, :]).to(scaled.dtype.element_ty), mask=mask)
        if scale_partials is not None:
            scale_sums = tl.fma(grad, tl.load(product + at, mask=mask, other=0.0).to(tl.float32), scale_sums)
        bias_sums += grad
    to = tl.program_id(1) * channels + column
    if bias_partials is not None:
        tl.store(bias_partials + to, tl.sum(bias_sums, axis=0) * factor, mask=inside)
    if scale_partials is not None:
        tl.store(scale_partials + to, tl.sum(scale_sums, axis=0), mask=inside)
