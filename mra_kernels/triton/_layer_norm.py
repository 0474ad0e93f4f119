"""LayerNorm over the channels of a map's positions, forward and backward, in place of the map or as 2x2 patch rows.

Work: a program owns whole positions, all channels in registers: mean, then variance from the differences. Backward
walks over a share of the positions and keeps its sums of gradients of parameters, which `add_partials` adds
in a fixed order.

Bytes: the map once in and once out, backward twice in. Bound by memory; behind a convolution at B = 1 the map is in L2.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mra_kernels.triton._sums import add_partials

# Elements of a program's block and of a warp, and the most programs that share the sums of a backward: three for each
# of 132 SMs.
ELEMENTS, WARP_ELEMENTS, PROGRAMS = 2048, 256, 396


def block_of(channels: int) -> tuple[int, int, int]:
    """Positions and channels of a block, and its warps."""
    columns = triton.next_power_of_2(channels)
    rows = max(1, min(16, ELEMENTS // columns))
    return rows, columns, max(1, min(16, rows * columns // WARP_ELEMENTS))


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, y: Tensor, patches: bool = False
) -> tuple[Tensor, Tensor]:
    """Writes the LayerNorm of `x`: [B, H, W, C] into `y`, and returns mean and rstd: [B, H, W], float32.

    Args:
        x, weight, bias: contiguous.
        y: [B, H, W, C], which may be `x`; or with `patches` [B, H // 2, W // 2, 4 * C], rows in the order (dy, dx, c).
    """
    batch, height, width, channels = x.shape
    mean, rstd = (x.new_empty(x.shape[:3], dtype=torch.float32) for _ in range(2))
    if x.numel() > 0:
        rows, columns, warps = block_of(channels)
        count = batch * height * width
        _layer_norm[(triton.cdiv(count, rows),)](
            x,
            weight,
            bias,
            y,
            mean,
            rstd,
            count,
            height,
            width,
            channels,
            eps,
            patches,
            rows,
            columns,
            num_warps=warps,
        )
    return mean, rstd


def layer_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    grad_x: Tensor | None,
    needs: Sequence[bool],
    patches: bool = False,
) -> tuple[Tensor, ...]:
    """Writes the gradient of `x` into `grad_x`, which may be `x`, unless it is None.

    Args:
        grad_y, x, weight: contiguous; shapes as in `layer_norm`.
        statistics: mean and rstd of `x`: [B, H, W]; None computes them again.
        eps: of the forward.
        needs: which returns to compute.

    Returns:
        Gradients of weight, bias and of a bias in front of the norm, which is the sum of `grad_x` over the positions:
        [C] each, in the dtype of `weight`; empty where `needs` says no.
    """
    batch, height, width, channels = x.shape
    count = batch * height * width
    rows, columns, warps = block_of(channels)
    steps = triton.cdiv(triton.cdiv(count, rows), PROGRAMS)
    programs = triton.cdiv(count, max(1, rows * steps))
    partials = [x.new_empty((programs, channels), dtype=torch.float32) if need else None for need in needs]
    if programs > 0 and (grad_x is not None or any(needs)):
        _layer_norm_backward[(programs,)](
            grad_y,
            x,
            weight,
            *(statistics or (None, None)),
            grad_x,
            *partials,
            count,
            steps,
            height,
            width,
            channels,
            eps,
            patches,
            rows,
            columns,
            num_warps=warps,
        )
    return tuple(weight.new_empty(0) if p is None else add_partials(p, weight.dtype) for p in partials)


@triton.jit(do_not_specialize=["count", "height", "width"])
def _layer_norm(
    x,
    weight,
    bias,
    y,
    mean,
    rstd,
    count,
    height,
    width,
    channels,
    eps,
    PATCHES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x: [count, channels] -> y, mean and rstd: [count]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    inside_c = c < channels
    mask = (row < count)[:, None] & inside_c[None, :]
    value = tl.load(x + row[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
    normal, center, scale = normalize(value, inside_c, channels, eps)
    gain = tl.load(weight + c, mask=inside_c, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=inside_c, other=0.0).to(tl.float32)
    result = tl.fma(normal, gain[None, :], shift[None, :])
    if PATCHES:
        at, kept = _patch(row, height, width, channels)
        mask = mask & kept[:, None]
    else:
        at = row * channels
    tl.store(y + at[:, None] + c[None, :], result.to(y.dtype.element_ty), mask=mask)
    tl.store(mean + row, center, mask=row < count)
    tl.store(rstd + row, scale, mask=row < count)


@triton.jit(do_not_specialize=["count", "steps", "height", "width"])
def _layer_norm_backward(
    grad_y,
    x,
    weight,
    mean,
    rstd,
    grad_x,
    weight_partials,
    bias_partials,
    x_partials,
    count,
    steps,
    height,
    width,
    channels,
    eps,
    PATCHES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x: [count, channels] -> grad_x: [count, channels], partials: [programs, channels]; None is not computed."""
    c = tl.arange(0, COLUMNS)
    inside_c = c < channels
    gain = tl.load(weight + c, mask=inside_c, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    x_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(0).to(tl.int64) * steps * ROWS
    for step in range(steps):
        row = first + step * ROWS + tl.arange(0, ROWS)
        inside = row < count
        mask = inside[:, None] & inside_c[None, :]
        if PATCHES:
            at, kept = _patch(row, height, width, channels)
            grad_mask = mask & kept[:, None]
        else:
            at = row * channels
            grad_mask = mask
        grad = tl.load(grad_y + at[:, None] + c[None, :], mask=grad_mask, other=0.0).to(tl.float32)
        here = row[:, None] * channels + c[None, :]
        value = tl.load(x + here, mask=mask, other=0.0).to(tl.float32)
        if mean is None:
            normal, _, scale = normalize(value, inside_c, channels, eps)
        else:
            scale = tl.load(rstd + row, mask=inside, other=0.0)
            normal = (value - tl.load(mean + row, mask=inside, other=0.0)[:, None]) * scale[:, None]
        # What is left over behind the last channel, and in positions without a patch, must not reach a sum.
        normal = tl.where(grad_mask, normal, 0.0)
        if weight_partials is not None:
            weight_sum = tl.fma(grad, normal, weight_sum)
        if bias_partials is not None:
            bias_sum += grad
        if grad_x is not None or x_partials is not None:
            inner = grad * gain[None, :]
            level = tl.sum(inner, axis=1) / channels
            slope = tl.sum(inner * normal, axis=1) / channels
            result = (inner - level[:, None] - normal * slope[:, None]) * scale[:, None]
            if grad_x is not None:
                tl.store(grad_x + here, result.to(grad_x.dtype.element_ty), mask=mask)
            if x_partials is not None:
                x_sum += tl.where(mask, result, 0.0)
    to = tl.program_id(0).to(tl.int64) * channels + c
    if weight_partials is not None:
        tl.store(weight_partials + to, tl.sum(weight_sum, axis=0), mask=inside_c)
    if bias_partials is not None:
        tl.store(bias_partials + to, tl.sum(bias_sum, axis=0), mask=inside_c)
    if x_partials is not None:
        tl.store(x_partials + to, tl.sum(x_sum, axis=0), mask=inside_c)


@triton.jit
def normalize(value, inside_c, channels, eps):
    """value: [rows, columns], float32, zero outside -> (value - mean) * rstd, zero outside, and mean, rstd: [rows]."""
    # Rounded to nearest: a constant row must have exactly itself as its mean.
    mean = tl.div_rn(tl.sum(value, axis=1), channels * 1.0)
    difference = tl.where(inside_c[None, :], value - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(difference * difference, axis=1) / channels + eps)
    return difference * rstd[:, None], mean, rstd


@triton.jit
def _patch(row, height, width, channels):
    """Where position `row` of a map goes among 2x2 patch rows, and whether it is in a whole patch."""
    w = row % width
    h = row // width % height
    b = row // width // height
    patch_row = (b * (height // 2) + h // 2) * (width // 2) + w // 2
    kept = (h < height // 2 * 2) & (w < width // 2 * 2)
    return (patch_row * 4 + h % 2 * 2 + w % 2) * channels, kept
