"""The fused products of the Triton backend: every op that has one, by descriptors and by pointers, at each tiling."""

from typing import Any

import pytest
import torch
from op_calls import Route, check, make_grad_outputs, routes

from mra_kernels.testing import make_inputs

pytest.importorskip("triton", reason="Triton is not installed")

from mra_kernels.triton import _gemm

# Rows are odd and columns no multiple of a tile; operands are aligned, or the library would serve.
SHAPES: dict[str, tuple] = {
    "gated_projection_add": ((3, 67), 264, 72, 40),
    "linear_gelu": ((201,), 72, 264),
    "linear_scale_residual": ((3, 67), 72, 264),
}
UNALIGNED: dict[str, tuple] = {
    "gated_projection_add": ((3, 67), 264, 72, 39),
    "linear_gelu": ((201,), 70, 264),
    "linear_scale_residual": ((3, 67), 70, 264),
}
DTYPES = (torch.bfloat16, torch.float16)
CASES = [
    pytest.param(op, route, id=f"{op}-{route}")
    for op in SHAPES
    for parameter in routes(op, ("triton",), DTYPES)
    for route in parameter.values
    if not parameter.marks
]
pytestmark = pytest.mark.skipif(not CASES, reason="no CUDA device; TRITON_INTERPRET=1 runs these without one")


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gemm, "FUSED", set(SHAPES))


def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is launched from here on."""
    made: list[Any] = []
    launch = _gemm.launch
    monkeypatch.setattr(_gemm, "launch", lambda *arguments: (made.append(arguments), launch(*arguments)))
    return made


# Few multiprocessors have wide tiles, and several each; many have narrow ones.
@pytest.mark.parametrize("multiprocessors", [2, 4, 132])
@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("large", [True, False], ids=["large", "small"])
@pytest.mark.parametrize(("op", "route"), CASES)
def test_values_and_gradients(
    op: str, route: Route, multiprocessors: int, descriptors: bool, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if descriptors and not large:
        pytest.skip("no such GPU")
    if route.device == "cuda" and descriptors and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no descriptors")
    monkeypatch.setattr(_gemm, "_device_of", lambda y: _gemm.Device(multiprocessors, descriptors, large))
    made = launches(monkeypatch)
    inputs = make_inputs(op, *SHAPES[op], dtype=route.dtype, device=route.device, seed=multiprocessors)
    check(op, route, inputs, make_grad_outputs(op, inputs))
    assert len(made) == 1


@pytest.mark.parametrize(("op", "route"), CASES)
def test_what_is_not_aligned_takes_the_library(op: str, route: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    made = launches(monkeypatch)
    float32 = Route(route.device, route.backend, torch.float32)
    for dims, taken in ((UNALIGNED[op], route), (SHAPES[op], float32)):
        inputs = make_inputs(op, *dims, dtype=taken.dtype, device=route.device)
        check(op, taken, inputs, make_grad_outputs(op, inputs))
    assert not made


@pytest.mark.parametrize("group", [1, 3, 8])
def test_every_tile_is_visited_once(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that do not divide the rows of tiles, as in `tile_at`."""
    monkeypatch.setattr(_gemm, "_GROUP", group)
    monkeypatch.setattr(_gemm, "_device_of", lambda y: _gemm.Device(3, False, False))
    op, route = CASES[0].values
    inputs = make_inputs(op, (1, 128 * 5 - 3), 264, 8, 8, dtype=route.dtype, device=route.device)
    check(op, route, inputs, make_grad_outputs(op, inputs), ["gate"])


def test_wide_tiles_only_where_they_fill_the_device() -> None:
    device = _gemm.Device(132, True, True)
    assert _gemm.tiling(65536, 768, device).columns == 256
    assert _gemm.tiling(4096, 768, device) == _gemm.Tiling(128, 128, 64, 8, 4)
    assert _gemm.tiling(1024, 1024, device).rows == 64
    assert _gemm.tiling(65536, 768, _gemm.Device(128, True, False)).depth == 32
