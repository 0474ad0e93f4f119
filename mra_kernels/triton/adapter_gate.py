"""`adapter_gate` in Triton: tanh(W2 GELU(W1 [low_mean, high_mean] + b1) + b2), one scalar a picture.

A launch-bound op: at C = 1024 and D = 512 it reads the 2 MB of W1 once for every four pictures, and multiplies each
weight with a few numbers. One multiprocessor alone would need 10 us or more for that, so a program takes a few rows of
W1, and a second launch adds up what the programs contribute to the second layer.

forward:   `_hidden` (W1, GELU, its share of W2), `_finish` (sum over programs, tanh)
backward:  both again, now keeping W1's output and turning the sum into the gradient before tanh, then
           `_weight_gradients` over rows of W1, `_mean_gradients` over its columns; sums over pictures are in order

Everything is computed in float32; the weights are read in their dtype.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mra_kernels.triton._gelu import gelu, gelu_derivative

# Rows of W1 of a program of `_hidden` and `_weight_gradients`, and the most pictures and columns it has in registers.
_ROWS, _BATCH, _COLUMNS = 4, 4, 512
# Of `_mean_gradients`: columns of a program, rows at a time.
_MEAN_COLUMNS, _MEAN_ROWS = 64, 64


def forward(
    low_mean: Tensor, high_mean: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, down_bias: Tensor
) -> Tensor:
    """Means: [B, C], float32, up_weight: [D, 2C], down_weight: [1, D] -> gate: [B], float32."""
    low_mean, high_mean, up_weight, up_bias, down_weight, down_bias = map(
        Tensor.contiguous, (low_mean, high_mean, up_weight, up_bias, down_weight, down_bias)
    )
    partials = _first_layer(low_mean, high_mean, up_weight, up_bias, down_weight, None)
    return _second_layer(partials, down_bias, None)


def backward(
    grad_gate: Tensor,
    low_mean: Tensor,
    high_mean: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of all six inputs, in their order; empty where `needs` says no."""
    inputs = [t.contiguous() for t in (low_mean, high_mean, up_weight, up_bias, down_weight, down_bias)]
    low_mean, high_mean, up_weight, up_bias, down_weight, down_bias = inputs
    grads = [t.new_empty(t.shape if need else 0) for t, need in zip(inputs, needs, strict=True)]
    batch, channels = low_mean.shape
    hidden = up_weight.shape[0]
    if batch == 0:
        return tuple(grad.zero_() for grad in grads)
    product = low_mean.new_empty(batch, hidden)
    partials = _first_layer(low_mean, high_mean, up_weight, up_bias, down_weight, product)
    grad_sum = _second_layer(partials, down_bias, grad_gate.contiguous())
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    if any(needs[2:]):
        columns = min(_COLUMNS, triton.next_power_of_2(channels))
        _weight_gradients[(triton.cdiv(hidden, _ROWS),)](
            grad_sum, product, low_mean, high_mean, down_weight, *wanted[2:], batch, channels, hidden, _ROWS, columns
        )
    if any(needs[:2]):
        _mean_gradients[(triton.cdiv(channels, _MEAN_COLUMNS), batch)](
            grad_sum, product, up_weight, down_weight, *wanted[:2], channels, hidden, _MEAN_ROWS, _MEAN_COLUMNS
        )
    return tuple(grads)


def _first_layer(
    low_mean: Tensor, high_mean: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, product: Tensor | None
) -> Tensor:
    """Each program's share of the second layer's sum: [B, programs]; writes W1's output into `product`: [B, D]."""
    batch, channels = low_mean.shape
    hidden = up_weight.shape[0]
    programs = triton.cdiv(hidden, _ROWS)
    pictures = min(_BATCH, triton.next_power_of_2(batch))
    columns = min(_COLUMNS, triton.next_power_of_2(channels))
    partials = low_mean.new_empty(batch, programs)
    if batch > 0:
        _hidden[(programs, triton.cdiv(batch, pictures))](
            low_mean,
            high_mean,
            up_weight,
            up_bias,
            down_weight,
            product,
            partials,
            batch,
            channels,
            hidden,
            pictures,
            _ROWS,
            columns,
        )
    return partials


def _second_layer(partials: Tensor, down_bias: Tensor, grad_gate: Tensor | None) -> Tensor:
    """partials: [B, programs] -> the gate: [B], or, with its gradient, the gradient of what tanh is taken of: [B]."""
    batch, programs = partials.shape
    result = partials.new_empty(batch)
    if batch > 0:
        block = min(1024, triton.next_power_of_2(programs))
        _finish[(batch,)](partials, down_bias, grad_gate, result, programs, block)
    return result


@triton.jit(do_not_specialize=["batch"])
def _hidden(
    low_mean,
    high_mean,
    up_weight,
    up_bias,
    down_weight,
    product,
    partials,
    batch,
    channels,
    hidden,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Means: [batch, channels], up_weight: [hidden, 2 * channels] -> product: [batch, hidden] or None, partials."""
    # Three dimensions: pictures, rows, columns.
    picture = tl.program_id(1) * BATCH + tl.arange(0, BATCH)[:, None, None]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :, None]
    lane = tl.arange(0, COLUMNS)[None, None, :]
    sums = tl.zeros((BATCH, ROWS, COLUMNS), tl.float32)
    for first in range(0, channels, COLUMNS):
        column = first + lane
        inside = column < channels
        weights = (row < hidden) & inside
        means = (picture < batch) & inside
        low_weight = tl.load(up_weight + row * 2 * channels + column, mask=weights, other=0.0).to(tl.float32)
        high_weight = tl.load(up_weight + (row * 2 + 1) * channels + column, mask=weights, other=0.0).to(tl.float32)
        low = tl.load(low_mean + picture * channels + column, mask=means, other=0.0)
        high = tl.load(high_mean + picture * channels + column, mask=means, other=0.0)
        sums = tl.fma(low, low_weight, sums)
        sums = tl.fma(high, high_weight, sums)
    # Two dimensions from here: pictures, rows.
    picture = tl.program_id(1) * BATCH + tl.arange(0, BATCH)[:, None]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    inside = row < hidden
    x = tl.sum(sums, axis=2) + tl.load(up_bias + row, mask=inside, other=0.0).to(tl.float32)
    if product is not None:
        tl.store(product + picture * hidden + row, x, mask=inside & (picture < batch))
    share = tl.sum(gelu(x, tl.float32) * tl.load(down_weight + row, mask=inside, other=0.0).to(tl.float32), axis=1)
    picture = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    tl.store(partials + picture * tl.num_programs(0) + tl.program_id(0), share, mask=picture < batch)


@triton.jit
def _finish(partials, down_bias, grad_gate, result, programs, BLOCK: tl.constexpr):
    """partials: [B, programs] -> gate: [B]; with grad_gate: [B], the gradient of the sum before tanh."""
    picture = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, programs, BLOCK):
        sums += tl.load(partials + picture * programs + first + lane, mask=first + lane < programs, other=0.0)
    gate = _tanh(tl.sum(sums, axis=0) + tl.load(down_bias).to(tl.float32))
    if grad_gate is None:
        tl.store(result + picture, gate)
    else:
        tl.store(result + picture, tl.load(grad_gate + picture) * (1.0 - gate * gate))


@triton.jit(do_not_specialize=["batch"])
def _weight_gradients(
    grad_sum,
    product,
    low_mean,
    high_mean,
    down_weight,
    grad_up_weight,
    grad_up_bias,
    grad_down_weight,
    grad_down_bias,
    batch,
    channels,
    hidden,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """grad_sum: [batch], product: [batch, hidden] -> gradients of both layers' parameters; None is not computed."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < hidden
    down = tl.load(down_weight + row, mask=inside, other=0.0).to(tl.float32)
    up_bias = tl.zeros((ROWS,), tl.float32)
    down_row = tl.zeros((ROWS,), tl.float32)
    down_bias = 0.0
    for picture in range(batch):
        grad = tl.load(grad_sum + picture)
        x = tl.load(product + picture * hidden + row, mask=inside, other=0.0)
        up_bias += grad * down * gelu_derivative(x)
        down_row += grad * gelu(x, tl.float32)
        down_bias += grad
    if grad_up_bias is not None:
        tl.store(grad_up_bias + row, up_bias.to(grad_up_bias.dtype.element_ty), mask=inside)
    if grad_down_weight is not None:
        tl.store(grad_down_weight + row, down_row.to(grad_down_weight.dtype.element_ty), mask=inside)
    if grad_down_bias is not None:
        tl.store(grad_down_bias, down_bias, mask=tl.program_id(0) == 0)
    if grad_up_weight is not None:
        for first in range(0, channels, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            low_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            high_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for picture in range(batch):
                x = tl.load(product + picture * hidden + row, mask=inside, other=0.0)
                grad = (tl.load(grad_sum + picture) * down * gelu_derivative(x))[:, None]
                at = picture * channels + column
                low = tl.load(low_mean + at, mask=column < channels, other=0.0)
                high = tl.load(high_mean + at, mask=column < channels, other=0.0)
                low_sums = tl.fma(grad, low[None, :], low_sums)
                high_sums = tl.fma(grad, high[None, :], high_sums)
            mask = inside[:, None] & (column < channels)[None, :]
            to = grad_up_weight + row[:, None] * 2 * channels + column[None, :]
            tl.store(to, low_sums.to(grad_up_weight.dtype.element_ty), mask=mask)
            tl.store(to + channels, high_sums.to(grad_up_weight.dtype.element_ty), mask=mask)


@triton.jit
def _mean_gradients(
    grad_sum,
    product,
    up_weight,
    down_weight,
    grad_low_mean,
    grad_high_mean,
    channels,
    hidden,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """grad_sum: [B], product: [B, hidden], up_weight: [hidden, 2 * channels] -> the means' gradients: [B, channels]."""
    picture = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.load(grad_sum + picture)
    low_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    high_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, hidden, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < hidden
        x = tl.load(product + picture * hidden + row, mask=inside, other=0.0)
        down = tl.load(down_weight + row, mask=inside, other=0.0).to(tl.float32)
        grad = (scale * down * gelu_derivative(x))[:, None]
        mask = inside[:, None] & (column < channels)[None, :]
        at = up_weight + row[:, None] * 2 * channels + column[None, :]
        if grad_low_mean is not None:
            low_sums = tl.fma(grad, tl.load(at, mask=mask, other=0.0).to(tl.float32), low_sums)
        if grad_high_mean is not None:
            high_sums = tl.fma(grad, tl.load(at + channels, mask=mask, other=0.0).to(tl.float32), high_sums)
    at = picture * channels + column
    if grad_low_mean is not None:
        tl.store(grad_low_mean + at, tl.sum(low_sums, axis=0), mask=column < channels)
    if grad_high_mean is not None:
        tl.store(grad_high_mean + at, tl.sum(high_sums, axis=0), mask=column < channels)


@triton.jit
def _tanh(x):
    """An odd polynomial near 0, where 1 - exp(-2 |x|) would cancel; both are right to an ulp of float32."""
    z = x * x
    near = tl.fma(z, -0.0062824664, 0.0210777531)
    near = tl.fma(z, near, -0.0538538566)
    near = tl.fma(z, near, 0.133326017)
    near = tl.fma(z, near, -0.33333318)
    near = tl.fma(x * z, near, x)
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.55, near, tl.where(x < 0, -far, far))
