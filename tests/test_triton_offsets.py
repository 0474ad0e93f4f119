"""Maps of more than 2^31 elements under Triton's interpreter: the last picture comes out right.

Of every launch only the last program runs, and the library's products compute the last picture's rows alone.
"""

import os

import pytest
import torch
from large_maps import batch_of, end, last_of, multiply_last_rows
from op_calls import DATA, Inputs, Outputs, call, differentiable, make_grad_outputs, solve, solve_exactly

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 runs these", allow_module_level=True)

from triton_interpreter import only_last_program

from mra_kernels.testing import make_inputs, relative_error
from mra_kernels.triton import _depthwise_gradients, _gemm, _layer_norm, _rows, add_norm

# Sizes of one picture, such that the last program of every kernel has all that the last program of the next one reads.
PICTURES: dict[str, tuple] = {
    "add_norm": ((1, 8), 1024),
    "depthwise_conv_gelu": (1, 4, 4, 64),
    "depthwise_conv_norm": (1, 4, 4, 64),
    "gated_projection_add": ((1, 64), 128, 16, 128),
    "gated_resample_add bilinear": (1, 16, 32, 4, 8, 64),
    "gated_resample_add pooled": (1, 4, 8, 16, 32, 64),
    "gated_resample_add same": (1, 16, 32, 16, 32, 64),
    "linear_gelu": ((1, 64), 16, 128),
    "linear_scale_residual": ((1, 64), 16, 128),
    "norm_patchify": (1, 16, 16, 64),
    "patch_conv_norm": (1, 3, 16, 16, 64),
}
FUSED = ("gated_projection_add", "linear_gelu", "linear_scale_residual")


@pytest.fixture(autouse=True)
def _short_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many programs as there are blocks: one that sums over a share of the map would walk through all of it."""
    for module in (_depthwise_gradients, _layer_norm, _rows):
        monkeypatch.setattr(module, "PROGRAMS", 1 << 30)
    monkeypatch.setattr(add_norm, "_PROGRAMS", 1 << 30)
    monkeypatch.setattr(_gemm, "_device_of", lambda y: _gemm.Device(1 << 30, False, True))


@pytest.mark.parametrize(
    ("case", "fused"), [*((case, False) for case in PICTURES), *((op, True) for op in FUSED)], ids=str
)
def test_the_last_picture(case: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    op, *_ = case.split()
    monkeypatch.setattr(_gemm, "FUSED", set(FUSED) if fused else set())
    one = make_inputs(op, *PICTURES[case], dtype=torch.float16)
    # Means over a picture are no maps, and get no gradient.
    grads = [g if g.dim() > 2 else torch.zeros_like(g) for g in make_grad_outputs(op, one)]
    maps = [i for i, g in enumerate(grads) if g.dim() > 2]
    # The stem's backward is the library's.
    wanted = [n for n in differentiable(op, one) if n in DATA and n != "pixels"]
    exact = solve_exactly(op, one, tuple(grads), wanted)

    batch = batch_of(one, tuple(grads))
    many = {n: last_of(batch, v) if n in (*DATA, "gate") else v for n, v in one.items()}
    many_grads = tuple(last_of(batch, grads[i]) for i in maps)

    def large_maps(inputs: Inputs) -> Outputs:
        outputs = call(op, "triton", inputs)
        return tuple(outputs[i] for i in maps)

    multiply_last_rows(grads[maps[0]][0, ..., 0].numel(), monkeypatch)
    with only_last_program():
        actual = solve(large_maps, many, many_grads, wanted)
    pairs = {f"output {i}": (large, exact.outputs[i]) for i, large in zip(maps, actual.outputs, strict=True)}
    pairs |= {f"gradient of {n}": (actual.grads[n], exact.grads[n]) for n in wanted}
    for name, (large, small) in pairs.items():
        assert relative_error(end(large), end(small)) < 5e-3, name
