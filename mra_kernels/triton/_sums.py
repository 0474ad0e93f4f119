"""The second stage of a sum over programs: partial sums are added in a fixed order, so that results repeat bitwise."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of partial sums added at once, and columns of a program.
_ROWS, _COLUMNS = 16, 128


def add_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """partials: [P, ..., N], float32, contiguous -> their sums over the first dimension: [..., N] in `dtype`."""
    total = partials.new_empty(partials.shape[1:], dtype=dtype)
    if total.numel() > 0:
        grid = (triton.cdiv(total.numel(), _COLUMNS),)
        _add_partials[grid](partials, total, partials.shape[0], total.numel(), _ROWS, _COLUMNS, num_warps=4)
    return total


@triton.jit(do_not_specialize=["count"])
def _add_partials(partials, total, count, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """partials: [count, columns] -> total: [columns]; one program adds `COLUMNS` columns, `ROWS` rows at a time."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    inside = column < columns
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, count, ROWS):
        mask = (first + row < count)[:, None] & inside[None, :]
        sums += tl.load(
            partials + (first + row).to(tl.int64)[:, None] * columns + column[None, :], mask=mask, other=0.0
        )
    tl.store(total + column, tl.sum(sums, axis=0).to(total.dtype.element_ty), mask=inside)
