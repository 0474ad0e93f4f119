"""The CUDA C++ kernels of every op that has them, on the CPU simulator: no GPU, no toolkit.

Values and gradients against float64 by the rule of `mra_kernels.testing`, the same bits in every order of threads and
blocks, no atomics, silence of the sanitizers, and more elements than 32 bits count.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_simulator import ORDERS, build, run_python
from op_calls import DTYPES, Route, check, check_every_gelu, threads
from simulated_cases import LAYOUTS, SHAPES, check_not_finite, operands, run
from simulated_ops import FOLDER, extension, program, served_ops, simulated

TESTS = Path(__file__).parent
OPS = served_ops()
CASES = [(op, dims) for op in OPS for dims in SHAPES[op]]
SMALL = [(op, dims) for op in OPS for dims in SHAPES[op][:2]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "dims"), CASES, ids=str)
def test_values_and_gradients(op: str, dims: tuple, dtype: torch.dtype) -> None:
    inputs, grad_outputs = operands(op, dims, dtype)
    before = extension().simulator.statistics()
    with simulated():
        check(op, Route("cpu", "native", dtype), inputs, grad_outputs)
    after = extension().simulator.statistics()
    assert after.atomics == before.atomics
    assert after.launches > before.launches or 0 in dims or (0, 4) in dims


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "dims"), SMALL, ids=str)
def test_few_blocks_share_the_work(op: str, dims: tuple, dtype: torch.dtype) -> None:
    with simulated(multiprocessors=1):
        check(op, Route("cpu", "native", dtype), *operands(op, dims, dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gelu_of_every_16_bit_number(dtype: torch.dtype) -> None:
    with simulated():
        check_every_gelu(Route("cpu", "native", dtype))


# Blocks of these kernels stride over rows, since the second side of a grid ends at 65,535.
@pytest.mark.parametrize(
    ("op", "dims"),
    [("depthwise_conv_gelu", (1, 65537, 1, 8)), ("gated_resample_add", (1, 65537, 1, 65537, 1, 1))],
    ids=str,
)
def test_more_rows_than_a_grid(op: str, dims: tuple) -> None:
    with simulated():
        check(op, Route("cpu", "native", torch.float32), *operands(op, dims, torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "dims"), SMALL, ids=str)
def test_layout(op: str, dims: tuple, dtype: torch.dtype, layout: str) -> None:
    with simulated():
        check(op, Route("cpu", "native", dtype), *operands(op, dims, dtype, layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "dims"), SMALL, ids=str)
def test_every_order_gives_the_same_bits(op: str, dims: tuple, dtype: torch.dtype) -> None:
    inputs, grad_outputs = operands(op, dims, dtype)
    runs = [run(op, inputs, grad_outputs, order=order) for order in ORDERS]
    for solution in runs[1:]:
        for actual, first in zip(solution.outputs, runs[0].outputs, strict=True):
            assert torch.equal(actual, first)
        for name, grad in solution.grads.items():
            assert torch.equal(grad, runs[0].grads[name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# The middle one of 262 columns is the second block's of a row; the first block's last product has it among its inputs.
@pytest.mark.parametrize("width", [24, 3, 262])
@pytest.mark.parametrize("op", ["depthwise_conv_gelu", "depthwise_conv_norm"])
def test_what_is_not_finite_stays_local(op: str, width: int, dtype: torch.dtype, value: float) -> None:
    check_not_finite(op, width, dtype, value)


class TestSanitizers:
    # How many orders and sizes: two orders, because copies land late in one and at once in the other.
    @pytest.mark.parametrize(("kind", "orders", "count"), [("address", 1, 99), ("thread", 2, 1)])
    @pytest.mark.parametrize("op", OPS)
    def test_nothing_to_report(self, op: str, kind: str, orders: int, count: int) -> None:
        library = build(program(), kind, FOLDER)
        arguments = [str(TESTS / "simulated_cases.py"), str(library), str(orders), str(count), op]
        result = run_python(kind, arguments, [TESTS, TESTS.parent])
        assert result.returncode == 0, result.stdout[-500:] + result.stderr[-5000:]
