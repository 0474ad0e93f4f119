"""Maps of more than 2^31 elements: all pictures but the last are untouched zeros, whose pages cost nothing."""

import mmap
from collections.abc import Sequence
from math import prod

import pytest
import torch
from op_calls import DATA, Inputs, Outputs
from torch import Tensor

# What the last block or program writes is at the end of a tensor.
END = 16


def batch_of(one: Inputs, grads: Outputs) -> int:
    """How many pictures like `one` have more than 2^31 elements in the largest map."""
    return 2**31 // max(t.numel() for t in (*grads, *(one[n] for n in one if n in DATA))) + 2


def untouched(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros, of the system and not of an allocator, which may hand out what another test left."""
    if prod(shape) == 0:
        return torch.zeros(*shape, dtype=dtype)
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


def last_of(batch: int, picture: Tensor) -> Tensor:
    """picture: [1, ...] -> [batch, ...], zeros before it."""
    pictures = untouched((batch, *picture.shape[1:]), picture.dtype)
    pictures[-1] = picture[0]
    return pictures


def end(x: Tensor) -> Tensor:
    """What is compared."""
    return x.detach()[-1].flatten()[-END:]


def multiply_last_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's products of a tall matrix compute its last rows alone, and leave the others untouched."""
    addmm, matmul = torch.addmm, Tensor.__matmul__

    def multiply(left: Tensor, right: Tensor, base: Tensor | None = None) -> Tensor:
        if left.shape[0] <= rows:
            return matmul(left, right) if base is None else addmm(base, left, right)
        result = left.new_empty(left.shape[0], right.shape[1])
        last = base[-rows:] if base is not None and base.dim() > 1 else base
        result[-rows:] = multiply(left[-rows:], right, last)
        return result

    monkeypatch.setattr(Tensor, "__matmul__", multiply)
    monkeypatch.setattr(torch, "addmm", lambda base, left, right: multiply(left, right, base))
