"""What runs on the simulator, by op, and the program that runs it in a child process, for builds with a sanitizer.

An op joins with its sizes, as `make_inputs` takes them; its first two are small and ordinary. The others are odd, of
size one or empty, with and without 16-byte accesses, and the models' channel counts on small maps.
"""

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from cuda_simulator import ORDERS, Order
from op_calls import (
    Inputs,
    Outputs,
    Solution,
    call,
    differentiable,
    lay_out,
    make_grad_outputs,
    solve,
    solve_exactly,
)
from simulated_ops import Extension, simulated

from mra_kernels.testing import make_inputs, relative_error

SHAPES: dict[str, list[tuple]] = {
    # batch, channels, hidden
    "adapter_gate": [(2, 33, 17), (3, 64, 32), (0, 8, 4), (1, 1, 1), (2, 1024, 512)],
    # batch, height, width, channels
    "depthwise_conv_gelu": [
        (2, 5, 6, 40),
        (1, 9, 11, 33),
        (0, 4, 4, 8),
        (1, 1, 1, 1),
        (1, 1, 9, 24),
        (3, 17, 3, 72),
        (2, 7, 8, 100),
        (1, 24, 24, 64),
        (1, 8, 9, 1024),
        (1, 32, 32, 128),
        # So many pictures that a block has several rows: strips of 9, 9 and 7; on tensor cores four strips below each
        # other, of 4, 4, 4 and 3 rows, two of 4 and 3, and one of 4.
        (130, 25, 3, 12),
        (133, 15, 3, 8),
        (133, 7, 33, 8),
        (133, 4, 66, 8),
        # On tensor cores two tiles of columns.
        (2, 3, 150, 8),
    ],
    "depthwise_conv_norm": [
        (2, 5, 6, 40),
        (1, 9, 11, 33),
        (0, 4, 4, 8),
        (1, 1, 1, 8),
        (1, 1, 9, 24),
        (3, 17, 3, 72),
        (2, 7, 8, 100),
        (1, 32, 32, 192),
        (1, 16, 16, 384),
        (1, 8, 9, 768),
        (1, 3, 5, 1536),
        (1, 2, 3, 3072),
        # So many pictures that a block has several rows: strips of 9, 9 and 7; on tensor cores four strips below each
        # other, of 4, 4, 4 and 3 rows, two of 4 and 3, and one of 4.
        (130, 25, 3, 12),
        (133, 15, 3, 8),
        (133, 7, 33, 8),
        (133, 4, 66, 8),
        # On tensor cores two tiles of columns.
        (2, 3, 150, 8),
    ],
    # leading sizes, outputs, inputs of the low and of the high projection
    "gated_projection_add": [((2, 9), 24, 16, 8), ((1, 3, 5), 33, 17, 9), ((0, 4), 8, 8, 8), ((1, 64), 1024, 64, 96)],
    # batch, height, width, height and width of the high-resolution map, channels
    "gated_resample_add": [
        (2, 9, 8, 5, 3, 16),
        (2, 3, 4, 6, 12, 17),
        (2, 5, 4, 5, 4, 16),
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
        # More rows than a block has threads.
        (2, 300, 1, 300, 1, 8),
    ],
    # leading sizes, inputs, outputs, whether a mean is asked for
    "linear_gelu": [
        ((2, 5, 7), 24, 33, True),
        ((3, 9), 16, 64),
        ((0, 4), 8, 8, True),
        ((1, 1), 1, 1, True),
        ((3, 70), 20, 17),
        ((2, 300), 16, 40, True),
        ((1, 8, 8), 32, 768),
        ((1, 6, 7), 16, 3072),
        ((2, 24, 24), 8, 512, True),
        # More rows than a thread of each block takes at once.
        ((1, 4500), 4, 8, True),
    ],
    # leading sizes, inputs, outputs, whether there is a scale
    "linear_scale_residual": [
        ((2, 5, 7), 24, 33),
        ((3, 9), 16, 64),
        ((0, 4), 8, 8),
        ((1, 1), 1, 1),
        ((3, 70), 20, 17, False),
        ((2, 300), 16, 40),
        ((1, 8, 8), 32, 192),
        ((1, 6, 7), 16, 1536),
        ((1, 3, 5), 16, 3072),
        ((4500,), 4, 8),
    ],
    # batch, height, width, channels
    "norm_patchify": [
        (2, 7, 9, 40),
        (1, 4, 6, 33),
        (0, 4, 4, 8),
        (1, 2, 2, 3),
        (2, 3, 2, 1),
        (1, 32, 32, 192),
        (1, 16, 16, 384),
        (1, 8, 8, 768),
        (1, 5, 4, 1536),
        (1, 2, 4, 3072),
        # More channels than the registers of a block hold, several rows.
        (1, 2, 6, 3073),
    ],
    # batch, planes, height, width, channels, side of a patch
    "patch_conv_norm": [
        (2, 3, 13, 40, 33, 4),
        (1, 3, 16, 16, 64, 4),
        (0, 3, 8, 8, 16, 4),
        (1, 1, 1, 1, 3, 1),
        (2, 4, 9, 12, 20, 3),
        (1, 2, 10, 7, 40, 5),
        (1, 3, 64, 64, 192, 4),
        (1, 3, 32, 36, 384, 4),
    ],
}

# Less than every sixteenth byte aligned, and strides that are not the next size.
LAYOUTS = ("offset", "sliced")


def operands(op: str, dims: tuple, dtype: torch.dtype, layout: str = "contiguous") -> tuple[Inputs, Outputs]:
    """Inputs and the outputs' gradients."""
    inputs = lay_out(make_inputs(op, *dims, dtype=dtype), layout)
    return inputs, make_grad_outputs(op, inputs, layout=layout)


def run(
    op: str, inputs: Inputs, grad_outputs: Outputs, on: Extension | None = None, order: Order = ORDERS[0]
) -> Solution:
    """Forward and backward on the simulator."""
    with simulated(on, order):
        return solve(partial(call, op, "native"), inputs, grad_outputs, differentiable(op, inputs))


def check_not_finite(op: str, width: int, dtype: torch.dtype, value: float, on: Extension | None = None) -> None:
    """A number that is not finite, in a depthwise op's input or in a gradient, reaches its neighbors alone.

    On tensor cores a convolution multiplies what is further away by zeros, which leaves a NaN of it.
    """
    inputs, grad_outputs = operands(op, (1, 9, width, 16), dtype)
    place = (0, 4, width // 2, 3)
    sound = inputs["x"].clone()
    inputs["x"][place] = value
    exact = solve_exactly(op, inputs, grad_outputs, [])
    with simulated(on):
        outputs = call(op, "native", inputs)
    for actual, expected in zip(outputs, exact.outputs, strict=True):
        assert not (actual.isnan() & expected.isfinite()).any()
        if math.isnan(value):
            assert torch.equal(actual.isnan(), expected.isnan())
        _assert_near(actual, expected)

    inputs["x"] = sound
    grad_outputs[0][place] = value
    expected = solve_exactly(op, inputs, grad_outputs, ["x"]).grads["x"]
    actual = run(op, inputs, grad_outputs, on).grads["x"]
    assert torch.equal(actual.isfinite(), expected.isfinite())
    _assert_near(actual, expected)


def _assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Where both are finite."""
    finite = actual.isfinite() & expected.isfinite()
    assert relative_error(actual[finite], expected[finite]) < 1e-2


def main(library: str, orders: str, count: str, *ops: str) -> None:
    """Runs the first `count` sizes of the ops, aligned and not. float16's code is bfloat16's."""
    torch.set_num_threads(1)
    on = Extension(Path(library))
    for op in ops:
        for dims in SHAPES[op][: int(count)]:
            for dtype in (torch.float32, torch.bfloat16):
                for layout in ("contiguous", "offset"):
                    for order in ORDERS[: int(orders)]:
                        print(op, dims, dtype, layout, order, flush=True)
                        run(op, *operands(op, dims, dtype, layout), on, order)


if __name__ == "__main__":
    arguments: Sequence[str] = sys.argv[1:]
    main(*arguments)
