"""The interpreter that the Triton kernels are tested in: it rounds as a GPU does, and it finds planted bugs."""

import os
from collections.abc import Callable

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 runs these", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton_interpreter import only_program

from mra_kernels.triton._gelu import gelu


@triton.jit
def convert(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def multiply_add(x, y, z, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) * tl.load(y + i) + tl.load(z + i))


@triton.jit
def product(a, b, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)).to(out.dtype.element_ty))


@triton.jit
def gelu_before_rounding(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, gelu(tl.load(x + i), tl.float16))


@triton.jit
def total(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, BLOCK)), axis=0))


@triton.jit
def unmasked(x, out, n, BLOCK: tl.constexpr, LOADS: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if LOADS:
        tl.store(out + i, tl.load(x + i), mask=i < n)
    else:
        tl.store(out + i, tl.load(x + i, mask=i < n))


@triton.jit
def overlapping(out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0) * (BLOCK - 1) + i, i.to(tl.float32))


@triton.jit
def two_lanes(out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 2, i.to(tl.float32))


@triton.jit
def shift(x, out, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i + step))


@triton.jit
def add_one(x, out, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    column = tl.arange(0, COLUMNS)
    tl.store(out + row * COLUMNS + column, tl.load(x + row * COLUMNS + column) + 1)


def test_float32_rounds_to_bfloat16_as_pytorch_does() -> None:
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 3.4e38, 1e-40, 0.0, -0.0, 1 + 2**-8])
    x = torch.cat([special, torch.randn(4088) * torch.logspace(-30, 30, 4088)])
    y = torch.empty(4096, dtype=torch.bfloat16)
    convert[(1,)](x, y, 4096)
    assert torch.equal(y.view(torch.int16)[1:], x.bfloat16().view(torch.int16)[1:])
    assert y[0].isnan()
    back = torch.empty(4096)
    convert[(1,)](y, back, 4096)
    assert torch.equal(back[1:], y.float()[1:])


def test_bfloat16_arithmetic_rounds_each_step() -> None:
    x, y, z = torch.randn(3, 256).bfloat16()
    out = torch.empty_like(x)
    multiply_add[(1,)](x, y, z, out, 256)
    assert torch.equal(out, x * y + z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dot_sums_in_float32(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 64, 64).to(dtype)
    out = torch.empty(64, 64)
    product[(1,)](a, b, out, 64)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_a_reduction_of_bfloat16_is_refused() -> None:
    with pytest.raises(InterpreterError, match="convert to float32"):
        total[(1,)](torch.ones(16).bfloat16(), torch.zeros(1).bfloat16(), 16)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (lambda: unmasked[(2,)](torch.zeros(20), torch.zeros(20), 20, 16, False), "a store of 12 elements outside"),
        (lambda: unmasked[(2,)](torch.zeros(20), torch.zeros(20), 20, 16, True), "a load of 12 elements outside"),
        (lambda: unmasked[(1,)](torch.zeros(64)[:8], torch.zeros(16), 16, 16, True), "a load of 8 elements outside"),
        (lambda: overlapping[(4,)](torch.zeros(64), 16), "writes what another program writes"),
        (lambda: two_lanes[(1,)](torch.zeros(64), 16), "lanes of program"),
    ],
    ids=["store", "load", "view", "programs", "lanes"],
)
def test_a_planted_bug_is_found(launch: Callable, message: str) -> None:
    with pytest.raises(InterpreterError, match=message):
        launch()


@pytest.mark.parametrize(("step", "start", "message"), [(16, 0, "writes what another"), (0, 16, "reads what another")])
def test_reading_what_another_program_writes_is_found(step: int, start: int, message: str) -> None:
    x = torch.zeros(64)
    with pytest.raises(InterpreterError, match=message):
        shift[(2,)](x, x[start:], step, 16)


def test_in_place_and_shared_reads_are_no_race() -> None:
    x = torch.arange(64.0)
    shift[(4,)](x, x, 0, 16)
    assert torch.equal(x, torch.arange(64.0))


def test_an_offset_past_int32_is_found() -> None:
    """Untouched pages cost nothing: 3.2 billion elements, of which one program reads and writes the last row."""
    rows, columns = 3_145_728, 1024
    x, out = (torch.empty(rows, columns, dtype=torch.float16) for _ in range(2))
    x[-1] = 2
    with only_program(rows - 1):
        add_one[(1,)](x, out, columns, True)
        assert (out[-1] == 3).all()
        with pytest.raises(InterpreterError, match="outside every tensor argument"):
            add_one[(1,)](x, out, columns, False)


def test_gelu_of_16_bits_before_it_is_rounded() -> None:
    x = torch.linspace(-20, 20, 2**16)
    y = torch.empty_like(x)
    gelu_before_rounding[(1,)](x, y, x.numel())
    exact = torch.nn.functional.gelu(x.double())
    assert ((y - exact).abs() / exact.abs().clamp(min=1e-3)).max() < 2e-5
