"""`project_mean` in Triton: base + mean W^T + b, a row a picture, in float32 from weights in their dtype.

forward:   a program multiplies a few rows of W with the means of up to four pictures, in registers, and reads W once:
           3 MB for 1024 x 1536 in 16 bits, a microsecond at 4.3 TB/s, so a launch is what it costs. The library would
           convert W to float32 first: five times the bytes, and two launches more.
backward:  the library's products, and W converted for one of them.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

# Rows of W and pictures of a program; numbers that it multiplies at once.
_ROWS, _BATCH, _PRODUCTS = 4, 4, 8192


def forward(hidden_mean: Tensor, weight: Tensor, bias: Tensor, base_mean: Tensor | None) -> Tensor:
    """hidden_mean: [B, K], weight: [N, K], base_mean: [B, N] or None -> [B, N], float32."""
    hidden_mean, weight, bias = map(Tensor.contiguous, (hidden_mean, weight, bias))
    batch, inputs = hidden_mean.shape
    outputs = weight.shape[0]
    y = hidden_mean.new_empty(batch, outputs)
    if y.numel() > 0:
        pictures = min(_BATCH, triton.next_power_of_2(batch))
        columns = min(_PRODUCTS // (_ROWS * pictures), triton.next_power_of_2(inputs))
        grid = (triton.cdiv(outputs, _ROWS), triton.cdiv(batch, pictures))
        base = None if base_mean is None else base_mean.contiguous()
        _forward[grid](hidden_mean, weight, bias, base, y, batch, inputs, outputs, pictures, _ROWS, columns)
    return y


def backward(
    grad_y: Tensor, hidden_mean: Tensor, weight: Tensor, bias: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden_mean, weight and bias; empty where `needs` says no."""
    empty = grad_y.new_empty(0)
    return (
        grad_y @ weight.to(grad_y.dtype) if needs[0] else empty,
        (grad_y.mT @ hidden_mean).to(weight.dtype) if needs[1] else empty,
        grad_y.sum(0).to(bias.dtype) if needs[2] else empty,
    )


@triton.jit(do_not_specialize=["batch"])
def _forward(
    hidden_mean,
    weight,
    bias,
    base_mean,
    y,
    batch,
    inputs,
    outputs,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """hidden_mean: [batch, inputs], weight: [outputs, inputs], base_mean: [batch, outputs] or None -> y as that."""
    # Three dimensions: pictures, rows, columns.
    picture = tl.program_id(1).to(tl.int64) * BATCH + tl.arange(0, BATCH)[:, None, None]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :, None]
    lane = tl.arange(0, COLUMNS)[None, None, :]
    sums = tl.zeros((BATCH, ROWS, COLUMNS), tl.float32)
    for first in range(0, inputs, COLUMNS):
        column = first + lane
        inside = column < inputs
        weights = tl.load(weight + row * inputs + column, mask=(row < outputs) & inside, other=0.0).to(tl.float32)
        means = tl.load(hidden_mean + picture * inputs + column, mask=(picture < batch) & inside, other=0.0)
        sums = tl.fma(means, weights, sums)
    # Two dimensions from here: pictures, rows.
    picture = tl.program_id(1).to(tl.int64) * BATCH + tl.arange(0, BATCH)[:, None]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :]
    mask = (picture < batch) & (row < outputs)
    result = tl.sum(sums, axis=2) + tl.load(bias + row, mask=row < outputs, other=0.0).to(tl.float32)
    if base_mean is not None:
        result += tl.load(base_mean + picture * outputs + row, mask=mask, other=0.0)
    tl.store(y + picture * outputs + row, result, mask=mask)
