"""Every fused kernel that serves this device, against eager PyTorch, at the tower's shapes.

Which ones exist is asked of the dispatcher, so a new kernel is measured without a change here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mra_kernels
from bench.compare import Case, measure
from bench.shapes import LARGE, TINY, Tower
from bench.step import Result, Run
from mra_kernels.dispatch import AUTOMATIC
from mra_kernels.testing import GRADIENT_FACTOR, VALUE_FACTOR, make_inputs

DTYPE = torch.bfloat16

# Sizes that `make_inputs` takes, under the name of the case.
Cases = dict[str, tuple]


def run(run: Run, *, batch: int) -> None:
    """Forward, and forward with backward, of each op that a kernel backend serves."""
    found = False
    for choice in mra_kernels.backend_report(run.device, DTYPE):
        backends = [name for name in AUTOMATIC if name not in choice.reasons and name != "reference"]
        if not backends:
            continue
        found = True
        for label, dims in CASES[choice.op](run.pick(LARGE, TINY), batch).items():
            inputs = make_inputs(choice.op, *dims, dtype=DTYPE, device=run.device, seed=1)
            _forward(run, f"{choice.op} {label} B={batch}", choice.op, backends, inputs)
            _training(run, f"{choice.op} {label} B={batch}", choice.op, backends, inputs)
    if not found:
        run.record(Result("fused kernels", "none", facts={"why": "no kernel backend serves this device"}))


def _forward(run: Run, name: str, op: str, backends: list[str], inputs: dict[str, Any]) -> None:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = _call(op, "reference", inputs)
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    case = Case(
        name=f"{name} forward",
        variants={backend: partial(_without_grad, op, backend, inputs) for backend in ("reference", *backends)},
        outputs=tuple(f"output {index}" for index in range(len(outputs))),
        exact=lambda: _without_grad(op, "reference", _exact(inputs)),
        bytes=sum(tensor.nbytes for tensor in (*tensors, *outputs)),
        flops=counter.get_total_flops() or None,
        allowed=VALUE_FACTOR,
        dtype=DTYPE,
    )
    measure(run, case)


def _training(run: Run, name: str, op: str, backends: list[str], inputs: dict[str, Any]) -> None:
    """Forward and backward as autograd runs them, every gradient wanted."""
    grads = [torch.randn_like(output) for output in _without_grad(op, "reference", inputs)]
    wanted = [key for key, value in inputs.items() if isinstance(value, Tensor) and key != "mean_weights"]
    case = Case(
        name=f"{name} forward and backward",
        variants={
            backend: partial(_with_grad, op, backend, inputs, wanted, grads) for backend in ("reference", *backends)
        },
        outputs=tuple(f"grad_{key}" for key in wanted),
        exact=lambda: _with_grad(op, "reference", _exact(inputs), wanted, [grad.double() for grad in grads]),
        allowed=GRADIENT_FACTOR,
        dtype=DTYPE,
    )
    measure(run, case)


def _call(op: str, backend: str, inputs: dict[str, Any]) -> list[Tensor]:
    public: Callable = getattr(mra_kernels, op)
    with mra_kernels.use_backend(backend):
        outputs = public(*inputs.values())
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@torch.no_grad()
def _without_grad(op: str, backend: str, inputs: dict[str, Any]) -> list[Tensor]:
    return _call(op, backend, inputs)


def _with_grad(
    op: str, backend: str, inputs: dict[str, Any], wanted: list[str], grads: list[Tensor]
) -> tuple[Tensor, ...]:
    leaves = {key: value.detach().requires_grad_() if key in wanted else value for key, value in inputs.items()}
    outputs = _call(op, backend, leaves)
    return torch.autograd.grad(outputs, [leaves[key] for key in wanted], grads)


def _exact(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value.double() if isinstance(value, Tensor) else value for key, value in inputs.items()}


def _stage_maps(tower: Tower, batch: int) -> Cases:
    return {f"{side}x{side}x{c}": (batch, side, side, c) for side, c in tower.stages()}


def _linear_gelu(tower: Tower, batch: int) -> Cases:
    grid, high = tower.side // 32, tower.channels[-1]
    stages = {f"{side}x{side}x{c}": ((batch, side, side), c, 4 * c) for side, c in tower.stages()}
    return stages | {f"adapter {grid}x{grid}x{high}": ((batch, grid, grid), high, high, True)}


def _linear_scale_residual(tower: Tower, batch: int) -> Cases:
    return {f"{side}x{side}x{c}": ((batch, side, side), 4 * c, c) for side, c in tower.stages()}


def _gated_resample_add(tower: Tower, batch: int) -> Cases:
    """The three modes: 1024 pixels; 384 pixels, interpolated; 1536 pixels with a ViT of 336, pooled."""
    grid, c = tower.grid, tower.width
    return {
        f"same grid {grid}x{grid}x{c}": (batch, grid, grid, grid, grid, c),
        f"bilinear 12x12 to 24x24x{c}": (batch, 24, 24, 12, 12, c),
        f"pooled 48x48 to 24x24x{c}": (batch, 24, 24, 48, 48, c),
    }


CASES: dict[str, Callable[[Tower, int], Cases]] = {
    "adapter_gate": lambda tower, batch: {f"{tower.width}": (batch, tower.width, tower.width // 2)},
    "depthwise_conv_gelu": lambda tower, batch: {
        f"{tower.grid}x{tower.grid}x{tower.width}": (batch, tower.grid, tower.grid, tower.width)
    },
    "depthwise_conv_norm": _stage_maps,
    "gated_projection_add": lambda tower, batch: {
        f"{tower.grid}x{tower.grid}x{tower.width}": (
            (batch, tower.grid, tower.grid),
            tower.width,
            tower.width,
            tower.channels[-1],
        )
    },
    "gated_resample_add": _gated_resample_add,
    "linear_gelu": _linear_gelu,
    "linear_scale_residual": _linear_scale_residual,
    "norm_patchify": lambda tower, batch: dict(list(_stage_maps(tower, batch).items())[:-1]),
    "patch_conv_norm": lambda tower, batch: {
        f"{tower.side}x{tower.side}": (batch, 3, tower.side, tower.side, tower.channels[0])
    },
}
