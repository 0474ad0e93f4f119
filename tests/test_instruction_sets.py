"""Every native CPU kernel on every instruction set that this processor has: the widest one is not the only one."""

from collections.abc import Iterator

import pytest
import torch
from op_calls import Route, call, check, make_grad_outputs

from mra_kernels.native import _extension
from mra_kernels.testing import make_inputs

# By op: sizes with and without whole vectors of channels, whole and cut tiles.
SHAPES = {
    "attention": [(2, 37, 70, 3, 40), (1, 4, 530, 1, 64), (1, 33, 9, 2, 5)],
    "depthwise_conv_gelu": [(2, 9, 11, 40), (1, 16, 24, 64)],
    "depthwise_conv_norm": [(2, 9, 11, 40), (1, 16, 24, 64)],
    "gated_resample_add": [(2, 8, 8, 8, 8, 24), (1, 12, 12, 5, 7, 33), (1, 4, 6, 8, 12, 16)],
    "linear_gelu": [((2, 5, 7), 24, 33, True), ((3, 9), 16, 64)],
    "linear_scale_residual": [((2, 5, 7), 24, 33), ((3, 9), 16, 64, False)],
    "norm_patchify": [(2, 7, 9, 40)],
    "patch_conv_norm": [(2, 3, 13, 40, 33)],
}

# Outputs and gradients too large for the caches, which are written past them.
LARGE = {
    "depthwise_conv_norm": (1, 17, 213, 160),
    "norm_patchify": (1, 74, 64, 128),
    "patch_conv_norm": (1, 3, 260, 256, 160),
}


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    if _extension.PROBLEM is not None:
        pytest.skip(_extension.PROBLEM)
    before = _extension.extension.build_info()["instruction_set"]
    try:
        _extension.extension.select_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _extension.extension.select_instruction_set(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "dims"), [(op, dims) for op, shapes in SHAPES.items() for dims in shapes])
def test_values_and_gradients(instruction_set: str, op: str, dims: tuple, dtype: torch.dtype) -> None:
    inputs = make_inputs(op, *dims, dtype=dtype, seed=3)
    check(op, Route("cpu", "native", dtype), inputs, make_grad_outputs(op, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", LARGE)
def test_large_outputs(instruction_set: str, op: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(op, *LARGE[op], dtype=dtype, seed=4)
    (y,) = call(op, "native", inputs)
    assert y.nbytes > 2**20
    check(op, Route("cpu", "native", dtype), inputs, make_grad_outputs(op, inputs))


def test_an_unknown_one_is_refused() -> None:
    if _extension.PROBLEM is not None:
        pytest.skip(_extension.PROBLEM)
    with pytest.raises(ValueError, match="mmx is no instruction set"):
        _extension.extension.select_instruction_set("mmx")
