"""The fused product x W^T: an op's kernel adds up tiles of it with `accumulate`, and ends with an epilogue of its own.

One program goes through several tiles [ROWS, COLUMNS], as many programs as there are multiprocessors, in an order that
keeps the operands of `GROUP` rows of tiles in L2. Both operands are read along K, by TMA descriptors where the device
has them, else by pointers. Operands are bfloat16 or float16, sums float32.

`FUSED` names the ops that take it. `linear_gelu` and `linear_scale_residual` do not: on an H200 the library's
product and a pass of its own were faster at every stage but two ties (stage 1: 103 beside 130 us, and 61 beside 59).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# An op that is not here takes the library's product. Put a name in to compare the two.
FUSED = {"gated_projection_add"}

# Rows of tiles that are gone through together.
_GROUP = 8


@dataclass(frozen=True)
class Tiling:
    """Tile sizes, warps and pipeline stages of a launch."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# What fits into 100 KB of shared memory: GPUs before Hopper, and consumer ones.
_SMALL = Tiling(128, 128, 32, 8, 3)
# On Hopper and Blackwell by how many tiles there are: wide ones need the fewest bytes, narrow ones fill the device.
_HOPPER = (Tiling(128, 256, 64, 8, 3), Tiling(128, 128, 64, 8, 4), Tiling(64, 128, 64, 4, 5))


@dataclass(frozen=True)
class Device:
    """What a launch must know of a GPU."""

    multiprocessors: int
    has_tma: bool
    # 227 KB a block, not 99 or 163.
    large_shared_memory: bool


# What kernels are made for where there is no GPU, in the interpreter or ahead of time: an H200.
WITHOUT_GPU = Device(132, True, True)


def _device_of(tensor: Tensor) -> Device:
    """The GPU of a tensor; `WITHOUT_GPU` for tensors on none."""
    if not tensor.is_cuda:
        return WITHOUT_GPU
    properties = torch.cuda.get_device_properties(tensor.device)
    return Device(properties.multi_processor_count, properties.major >= 9, properties.major in (9, 10))


def tiling(rows: int, columns: int, device: Device) -> Tiling:
    """The tiles of a product [rows, columns]: the widest that still give every multiprocessor one."""
    if not device.large_shared_memory:
        return _SMALL
    for choice in _HOPPER[:-1]:
        if triton.cdiv(rows, choice.rows) * triton.cdiv(columns, choice.columns) >= device.multiprocessors:
            return choice
    return _HOPPER[-1]


def fuses(op: str, *operands: Tensor) -> bool:
    """Whether an op takes its fused product for these contiguous operands [R, K].

    They must be 16-bit, and begin and have rows at multiples of 16 bytes. Products of float32 run on CUDA cores, where
    Triton does not come near the library; so do copies of what is not aligned.
    """
    return op in FUSED and all(
        t.numel() > 0 and t.element_size() == 2 and t.shape[1] % 8 == 0 and t.data_ptr() % 16 == 0 for t in operands
    )


def launch(kernel: Any, operands: Sequence[tuple[Tensor, Tensor]], others: Sequence[Any], y: Tensor) -> None:
    """Runs a kernel that fills y: [R, N] from one or several products.

    Args:
        kernel: takes the operands, `others`, R, N, each product's K, then ROWS, COLUMNS, DEPTH, GROUP and TMA.
        operands: x: [R, K] and weight: [N, K] of each product, contiguous.
        others: whatever else the kernel takes.
        y: not empty.
    """
    rows, columns = y.shape
    device = _device_of(y)
    tiles = tiling(rows, columns, device)
    count = triton.cdiv(rows, tiles.rows) * triton.cdiv(columns, tiles.columns)
    factors: list[Any] = []
    for x, weight in operands:
        if device.has_tma:
            factors.append(TensorDescriptor.from_tensor(x, [tiles.rows, tiles.depth]))
            factors.append(TensorDescriptor.from_tensor(weight, [tiles.columns, tiles.depth]))
        else:
            factors += [x, weight]
    kernel[(min(device.multiprocessors, count),)](
        *factors,
        *others,
        rows,
        columns,
        *(x.shape[1] for x, _ in operands),
        tiles.rows,
        tiles.columns,
        tiles.depth,
        _GROUP,
        device.has_tma,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


@triton.jit
def tile_at(index, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Where tile number `index` of [rows, columns] begins: GROUP rows of tiles at a time, column by column."""
    down = tl.cdiv(rows, ROWS)
    across = tl.cdiv(columns, COLUMNS)
    group = index // (GROUP * across) * GROUP
    height = tl.minimum(down - group, GROUP)
    within = index % (GROUP * across)
    return (group + within % height) * ROWS, within // height * COLUMNS


@triton.jit
def accumulate(
    sums,
    x,
    weight,
    row,
    column,
    rows,
    columns,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """x: [rows, depth], weight: [columns, depth] -> sums + their product's tile [ROWS, COLUMNS] at (row, column).

    Rows and columns outside are of no meaning. With TMA both are descriptors, otherwise pointers.
    """
    if TMA:
        for first in range(0, depth, DEPTH):
            sums = tl.dot(x.load([row, first]), weight.load([column, first]).T, sums)
    else:
        lane = tl.arange(0, DEPTH)
        # Outside, a row or column that exists is read once more instead of masking each load.
        of_x = x + ((row + tl.arange(0, ROWS)) % rows).to(tl.int64)[:, None] * depth + lane[None, :]
        of_weight = weight + ((column + tl.arange(0, COLUMNS)) % columns).to(tl.int64)[None, :] * depth + lane[:, None]
        for first in range(0, depth, DEPTH):
            inside = first + lane < depth
            a = tl.load(of_x + first, mask=inside[None, :], other=0.0)
            b = tl.load(of_weight + first, mask=inside[:, None], other=0.0)
            sums = tl.dot(a, b, sums)
    return sums


@triton.jit
def halves(sums, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile: an epilogue that takes one after the other needs fewer registers."""
    return tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
