"""Maps of more than 2^31 elements on the CUDA simulator: the last picture comes out right.

Of every launch only the last blocks run, and the library's products compute the last picture's rows alone.
"""

from pathlib import Path

import pytest
import torch
from cuda_simulator import build, run_python
from large_maps import batch_of, end, last_of, multiply_last_rows, untouched
from op_calls import DATA, Inputs, Outputs, call, differentiable, make_grad_outputs, solve, solve_exactly, threads
from simulated_ops import FOLDER, Extension, program, simulated
from torch import Tensor

from mra_kernels.native import linear_gelu, linear_scale_residual
from mra_kernels.testing import make_inputs, relative_error

TESTS = Path(__file__).parent

# Sizes of one picture, such that the last block of every kernel has all that the last one of the next kernel reads.
PICTURES: dict[str, tuple] = {
    "depthwise_conv_gelu": (1, 4, 4, 64),
    "depthwise_conv_norm": (1, 4, 4, 64),
    "gated_resample_add bilinear": (1, 8, 16, 4, 8, 64),
    "gated_resample_add pooled": (1, 4, 8, 16, 32, 64),
    "gated_resample_add same": (1, 8, 16, 8, 16, 64),
    "linear_gelu": ((1, 64), 16, 128),
    "linear_scale_residual": ((1, 64), 16, 128),
    "norm_patchify": (1, 16, 16, 64),
    "patch_conv_norm": (1, 3, 16, 16, 64),
}
# An offset in 32 bits, as a kernel would have it by mistake.
OVERFLOW = {
    "cuda/gated_resample_add.cuh": [
        ("const int64_t offset = (static_cast<int64_t>(row) * width", "const int64_t offset = (row * width")
    ]
}

# As many as a grid has along y, so that one has little to do.
PARTS = 65535
MANY_PARTS = {"cuda/depthwise_weight_gradient.cu": [("kMaxBlocks = 320;", f"kMaxBlocks = {PARTS};")]}

# Where blocks stride over rows or tiles, the last one gets the last of a multiple of their number: the most that a grid
# has along y, or the stem's, of which one is enough, for they are long.
ROWS, STEM = 65535, 264


@pytest.mark.parametrize("case", PICTURES)
def test_the_last_picture(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, *_ = case.split()
    one = make_inputs(op, *PICTURES[case], dtype=torch.float16)
    # Means over a picture are no maps, and get no gradient.
    grads = [g if g.dim() > 2 else torch.zeros_like(g) for g in make_grad_outputs(op, one)]
    maps = [i for i, g in enumerate(grads) if g.dim() > 2]
    wanted = [n for n in differentiable(op, one) if n in DATA and n != "pixels"]
    exact = solve_exactly(op, one, tuple(grads), wanted)

    multiple, blocks = (STEM, 1) if op == "patch_conv_norm" else (ROWS, 8)
    batch = -(-batch_of(one, tuple(grads)) // multiple) * multiple
    many = {n: last_of(batch, v) if n in (*DATA, "gate") else v for n, v in one.items()}
    many_grads = tuple(last_of(batch, grads[i]) for i in maps)

    def large_maps(inputs: Inputs) -> Outputs:
        outputs = call(op, "native", inputs)
        return tuple(outputs[i] for i in maps)

    multiply_last_rows(grads[maps[0]][0, ..., 0].numel(), monkeypatch)

    def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
        return torch.addmm(bias, x.reshape(-1, weight.shape[1]), weight.mT).view(*x.shape[:-1], -1)

    for module in (linear_gelu, linear_scale_residual):
        monkeypatch.setattr(module, "linear", linear)
    with simulated(last_blocks=blocks), threads(1):
        actual = solve(large_maps, many, many_grads, wanted)
    pairs = {f"output {i}": (large, exact.outputs[i]) for i, large in zip(maps, actual.outputs, strict=True)}
    pairs |= {f"gradient of {n}": (actual.grads[n], exact.grads[n]) for n in wanted}
    for name, (large, small) in pairs.items():
        assert relative_error(end(large), end(small)) < 5e-3, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_last_part_of_a_weight_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensor cores and on CUDA cores; the last blocks of the second stage have the bias and the last taps."""
    wanted = ["weight", "bias"]
    one = make_inputs("depthwise_conv_gelu", 1, 8, 16, 64, dtype=dtype)
    # Of a picture of zeros the convolution is zero, too, where the gradient does not reach.
    one["bias"].zero_()
    grad_y, *means = make_grad_outputs("depthwise_conv_gelu", one)
    grads = (grad_y, *map(torch.zeros_like, means))
    exact = solve_exactly("depthwise_conv_gelu", one, grads, wanted)

    def y(inputs: Inputs) -> Outputs:
        return call("depthwise_conv_gelu", "native", inputs)[:1]

    batch = -(-batch_of(one, grads) // ROWS) * ROWS
    many = {**one, "x": last_of(batch, one["x"])}
    many_parts = Extension(build(program(MANY_PARTS), "plain", FOLDER))

    def new_empty(like: Tensor, size: int | tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return untouched(size if isinstance(size, tuple) else (size,), dtype or like.dtype)

    # Zeros are what the blocks that do not run would write.
    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: untouched(x.shape, x.dtype))
    with simulated(many_parts, last_blocks=8, multiprocessors=PARTS), threads(1):
        actual = solve(y, many, (last_of(batch, grad_y),), wanted)
    assert relative_error(actual.grads["bias"], exact.grads["bias"]) < 5e-3
    assert relative_error(actual.grads["weight"][..., 6, 4:], exact.grads["weight"][..., 6, 4:]) < 5e-3


def test_an_overflow_is_found() -> None:
    """In a child process, which it ends."""
    library = build(program(OVERFLOW), "plain", FOLDER)
    code = f"""
import pytest, simulated_ops
extension = simulated_ops.Extension(__import__("pathlib").Path({str(library)!r}))
simulated_ops.extension = lambda: extension
raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", {__file__!r}, "-k", "same"]))
"""
    found = run_python("plain", ["-c", code], [TESTS])
    assert found.returncode != 0
    assert "1 passed" not in found.stdout
    sound = run_python("plain", ["-c", code.replace(str(library), str(build(program(), "plain", FOLDER)))], [TESTS])
    assert sound.returncode == 0, sound.stdout
