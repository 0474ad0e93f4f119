"""CUDA C++ kernels on the CPU simulator, against float64 by the rule of `mra_kernels.testing`.

An op joins with a line in `SHAPES`: the sizes that `make_inputs` takes.
"""

from collections.abc import Iterator

import pytest
import torch
from op_calls import DTYPES, Route, check, make_grad_outputs, threads
from simulated_ops import extension, served_ops, simulated

from mra_kernels.testing import make_inputs

# By op: odd sizes, sizes of one, widths with and without 16-byte accesses, real channel counts on small maps.
SHAPES: dict[str, list[tuple]] = {
    "gated_resample_add": [
        # batch, height, width, height and width of the high-resolution map, channels
        (2, 9, 8, 5, 3, 16),
        (2, 5, 4, 5, 4, 16),
        (2, 3, 4, 6, 12, 16),
        (0, 4, 5, 2, 3, 8),
        (1, 1, 1, 1, 1, 1),
        (1, 1, 1, 5, 7, 3),
        (2, 7, 7, 1, 1, 3),
        (2, 1, 9, 1, 4, 17),
        (1, 4, 6, 4, 3, 40),
        (3, 2, 1, 4, 1, 1),
        (1, 24, 24, 12, 12, 24),
        (1, 24, 24, 24, 24, 1024),
        (1, 8, 8, 16, 16, 1024),
        (1, 32, 32, 16, 16, 1024),
    ],
}


def cases() -> list[tuple]:
    return [(op, dims) for op in served_ops() for dims in SHAPES.get(op, ())]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "dims"), cases(), ids=str)
def test_values_and_gradients(op: str, dims: tuple, dtype: torch.dtype) -> None:
    inputs = make_inputs(op, *dims, dtype=dtype)
    grad_outputs = make_grad_outputs(op, inputs)
    atomics = extension().simulator.statistics().atomics
    with simulated():
        check(op, Route("cpu", "native", dtype), inputs, grad_outputs)
    assert extension().simulator.statistics().atomics == atomics
