"""Calling an op every way it can be called, solving the same problem in float64, and comparing the two."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

import mra_kernels
from mra_kernels.dispatch import why_not
from mra_kernels.ops import OPS
from mra_kernels.testing import LAYOUTS, argument_names, assert_close
from mra_kernels.triton._support import supports as triton_supports

# Maps and their like; the other tensors are parameters, gates or weights of a mean.
DATA = (
    "x",
    "delta",
    "pixels",
    "low",
    "high",
    "residual",
    "low_hidden",
    "high_hidden",
    "low_mean",
    "high_mean",
    "hidden_mean",
    "base_mean",
    "query",
    "key",
    "value",
)
NORM_OPS = ("add_norm", "depthwise_conv_norm", "norm_patchify", "patch_conv_norm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = ("native", "triton")
REGISTERED = ("operator", *KERNELS)
BACKENDS = ("reference", *REGISTERED)

# What a whole module or model is run on.
CHOICES = ("reference", "auto", "triton")

Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Route:
    """One way through the package: `operator` is `torch.ops.mra.<op>` on backend `reference`, gradients included."""

    device: str
    backend: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device}-{self.backend}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def schema_backend(self) -> str:
        """What the registered op takes as its backend."""
        return "reference" if self.backend == "operator" else self.backend

    @property
    def is_kernel(self) -> bool:
        return self.backend in KERNELS


def routes(op: str, backends: Sequence[str] = BACKENDS, dtypes: Sequence[torch.dtype] = DTYPES) -> list[Any]:
    """Every device, backend and dtype of an op; what cannot run here is skipped with its reason, once."""
    found = []
    for device in ("cpu", "cuda"):
        here = device == "cpu" or torch.cuda.is_available()
        marks = [pytest.mark.gpu] if device == "cuda" else []
        if not here:
            route = Route(device, backends[0], dtypes[0])
            found.append(pytest.param(route, marks=[*marks, pytest.mark.skip(reason="no CUDA device")]))
            continue
        for backend in backends:
            if backend in KERNELS and isinstance(OPS[op].backends[backend], str):
                continue
            for dtype in dtypes:
                route = Route(device, backend, dtype)
                reason = why_not(OPS[op].backends, route.schema_backend, torch.device(device), dtype)
                skip = [] if reason is None else [pytest.mark.skip(reason=f"{op}, {backend}: {reason}")]
                found.append(pytest.param(route, marks=[*marks, *skip]))
    return found


def require(choice: str, device: str, dtype: torch.dtype) -> None:
    """Skips a test where one of `CHOICES` cannot serve, with the reason."""
    if choice == "triton" and (reason := triton_supports(torch.device(device), dtype)):
        pytest.skip(f"triton: {reason}")


# Returns that only backward reads, and the ops that return one of them only when asked.
KEPT = ("mean", "rstd", "product", "logsumexp")
KEEPING = {op for op in OPS if "bool keep" in str(getattr(torch.ops.mra, op).default._schema)}


def call_operator(op: str, arguments: Iterable[Any], backend: str, keep: bool = True) -> Outputs:
    """Every return of `torch.ops.mra.<op>`; `arguments` are those of the public function."""
    return as_tuple(getattr(torch.ops.mra, op)(*operator_arguments(op, arguments, backend, keep)))


def operator_arguments(op: str, arguments: Iterable[Any], backend: str, keep: bool = True) -> list[Any]:
    """What `torch.ops.mra.<op>` takes."""
    return [*arguments, keep, backend] if op in KEEPING else [*arguments, backend]


def public_outputs(op: str, inputs: Inputs) -> list[str]:
    """Names of what the caller sees: the schema's returns without statistics, and without a mean nobody asked for."""
    names = [r.name for r in getattr(torch.ops.mra, op).default._schema.returns]
    without_mean = op == "linear_gelu" and inputs["mean_weights"] is None
    return [n for n in names if n not in KEPT and not (without_mean and n == "y_mean")]


def differentiable(op: str, inputs: Inputs) -> list[str]:
    """Names of the tensors that have a gradient."""
    return [n for n, value in inputs.items() if isinstance(value, Tensor) and n != "mean_weights"]


def call(op: str, backend: str, inputs: Inputs) -> Outputs:
    """The public outputs; `backend` as in `Route`."""
    if backend == "operator":
        outputs = call_operator(op, inputs.values(), "reference")
    else:
        with mra_kernels.use_backend(backend):
            outputs = getattr(mra_kernels, op)(*inputs.values())
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    return outputs[: len(public_outputs(op, inputs))]


@dataclass
class Solution:
    """Outputs and gradients of one call."""

    outputs: Outputs
    grads: dict[str, Tensor]


def solve(function: Callable[[Inputs], Outputs], inputs: Inputs, grad_outputs: Outputs, wanted: list[str]) -> Solution:
    """Runs forward and backward; `wanted` names the inputs that require a gradient."""
    leaves = {n: v.detach() if isinstance(v, Tensor) else v for n, v in inputs.items()}
    for name in wanted:
        leaves[name].requires_grad_()
    outputs = function(leaves)
    if not wanted:
        return Solution(outputs, {})
    reached = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in reached], [leaves[n] for n in wanted], [g for _, g in reached], materialize_grads=True
    )
    return Solution(outputs, dict(zip(wanted, grads, strict=True)))


def _written_out(op: str, options: dict[str, bool], inputs: Inputs) -> Outputs:
    outputs = getattr(oracle, op)(*inputs.values(), **options)
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def solve_exactly(op: str, inputs: Inputs, grad_outputs: Outputs, wanted: list[str], **options: bool) -> Solution:
    """The same problem in float64, by the op as it is written out in `oracle`."""
    exact = {n: _double(v) for n, v in inputs.items()}
    return solve(partial(_written_out, op, options), exact, tuple(g.double() for g in grad_outputs), wanted)


def _sensitivity(op: str, inputs: Inputs, grad_outputs: Outputs, wanted: list[str], exact: Solution) -> Solution:
    """How far results move, per relative change, when every input moves at random; and what a LayerNorm cancels."""
    step = 1e-6
    generator = torch.Generator().manual_seed(5)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
        return value.double() * (1 + step * noise)

    draws = [
        solve_exactly(op, {n: moved(v) for n, v in inputs.items()}, tuple(map(moved, grad_outputs)), wanted)
        for _ in range(2)
    ]
    outputs = [
        torch.stack([(d.outputs[i] - e).abs() for d in draws]).amax(0) / step for i, e in enumerate(exact.outputs)
    ]
    grads = {n: torch.stack([(d.grads[n] - e).abs() for d in draws]).amax(0) / step for n, e in exact.grads.items()}
    if op in NORM_OPS:
        cancelled = solve_exactly(op, inputs, grad_outputs, wanted, uncentered=True)
        outputs = [o + c.abs() for o, c in zip(outputs, cancelled.outputs, strict=True)]
        grads = {n: g + cancelled.grads[n].abs() for n, g in grads.items()}
    return Solution(tuple(outputs), grads)


def make_grad_outputs(op: str, inputs: Inputs, seed: int = 1, layout: str = "contiguous") -> Outputs:
    """Gradients of the public outputs, in their shapes and dtypes; random, but for `expanded`."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for output in call(op, "reference", inputs):
        values = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device, output.dtype)
        # The backward of a sum hands on a one with stride 0 everywhere.
        expanded = values.new_ones(()).expand(values.shape)
        made.append(expanded if layout == "expanded" else LAYOUTS[layout](values))
    return tuple(made)


def check_every_gelu(route: Route) -> None:
    """`linear_gelu` of every 16-bit number, beside the result in float64 rounded once."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = bits.view(route.dtype)
    # PyTorch's own is infinite beyond.
    x = x[x.abs() < 1e38]
    exact = torch.nn.functional.gelu(x.double())
    one, zero = torch.ones(1, 1, dtype=route.dtype), torch.zeros(1, dtype=route.dtype)
    inputs = {"x": x[:, None], "weight": one, "bias": zero, "mean_weights": None}
    (y,) = call("linear_gelu", route.backend, {n: t if t is None else t.to(route.device) for n, t in inputs.items()})
    y = y[:, 0].cpu()
    steps = (y.view(torch.int16).int() - exact.to(route.dtype).view(torch.int16).int()).abs()
    is_small = exact.abs() < 1e-3
    assert steps[~is_small].max() <= 1
    # Off by a little, a result is sometimes rounded the other way.
    assert (steps[~is_small] > 0).float().mean() < 0.01
    assert (y - exact)[is_small].abs().max() < 1e-3 * torch.finfo(route.dtype).eps / 2 + 1e-7


def check(op: str, route: Route, inputs: Inputs, grad_outputs: Outputs, wanted: list[str] | None = None) -> Solution:
    """Holds outputs and gradients of one route to the tolerance rule; returns them."""
    wanted = differentiable(op, inputs) if wanted is None else wanted
    actual = solve(partial(call, op, route.backend), inputs, grad_outputs, wanted)
    exact = solve_exactly(op, inputs, grad_outputs, wanted)
    reaction = _sensitivity(op, inputs, grad_outputs, wanted, exact)
    own = solve(partial(call, op, "reference"), inputs, grad_outputs, wanted) if route.is_kernel else None
    y = exact.outputs[0]
    for i, name in enumerate(public_outputs(op, inputs)):
        assert_close(
            actual.outputs[i],
            exact.outputs[i],
            route.dtype,
            baseline=own.outputs[i] if own else None,
            sensitivity=reaction.outputs[i],
            rows=max(1, y.numel() // max(1, exact.outputs[i].numel())),
            name=f"{op}: {name}",
        )
    for name in wanted:
        grad = actual.grads[name]
        assert grad.dtype == inputs[name].dtype, f"gradient of {name} is {grad.dtype}"
        assert_close(
            grad,
            exact.grads[name],
            route.dtype,
            baseline=own.grads[name] if own else None,
            gradient=True,
            sensitivity=reaction.grads[name],
            rows=1 if name in DATA else max(1, y.numel() // max(1, grad.shape[0])),
            name=f"{op}: gradient of {name}",
        )
    return actual


def lay_out(inputs: Inputs, layout: str) -> Inputs:
    """Every tensor in another memory layout; `expanded` is for maps alone, since a parameter has no batch."""
    moved = [n for n, v in inputs.items() if isinstance(v, Tensor) and (layout != "expanded" or n in DATA)]
    return inputs | {n: LAYOUTS[layout](inputs[n]) for n in moved}


def backward_arguments(op: str, backend: str, inputs: Inputs, grad_outputs: Outputs) -> list[Any]:
    """What `torch.ops.mra.<op>_backward` takes before `needs` and the backend, statistics from a forward included."""
    outputs = call_operator(op, inputs.values(), backend)
    named = inputs | dict(
        zip([r.name for r in getattr(torch.ops.mra, op).default._schema.returns], outputs, strict=True)
    )
    named |= {f"grad_{n}": g for n, g in zip(public_outputs(op, inputs), grad_outputs, strict=True)}
    schema = getattr(torch.ops.mra, f"{op}_backward").default._schema
    return [named.get(argument.name) for argument in schema.arguments[:-2]]


def backward_names(op: str) -> list[str]:
    """The inputs whose gradients the backward op returns, in order."""
    schema = getattr(torch.ops.mra, f"{op}_backward").default._schema
    return [r.name.removeprefix("grad_") for r in schema.returns]


def as_tuple(result: Any) -> Outputs:
    return (result,) if isinstance(result, Tensor) else tuple(result)


class Bound(nn.Module):
    """An op with its parameters held by a module, as users hold them: then only maps have dynamic sizes."""

    def __init__(self, op: str, backend: str, inputs: Inputs) -> None:
        super().__init__()
        self.op = op
        self.backend = backend
        self.names = argument_names(op)
        self.constants = {n: v for n, v in inputs.items() if not isinstance(v, Tensor)}
        for name, value in inputs.items():
            if isinstance(value, Tensor) and not is_data(name):
                self.register_parameter(name, nn.Parameter(value.detach().clone()))

    def forward(self, *data: Tensor) -> Outputs:
        maps: Iterator[Tensor] = iter(data)
        arguments = [
            self.constants[n] if n in self.constants else next(maps) if is_data(n) else getattr(self, n)
            for n in self.names
        ]
        if self.backend == "operator":
            return call_operator(self.op, arguments, "reference")
        return as_tuple(getattr(mra_kernels, self.op)(*arguments))


def is_data(name: str) -> bool:
    """What comes with each call of a module: maps, gates and weights of a mean."""
    return name in (*DATA, "gate", "mean_weights")


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Runs the block with this many threads of PyTorch, and of the kernels, which follow it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def devices() -> list[Any]:
    """Test parameters: the CPU, and a GPU where there is one."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, skip])]
