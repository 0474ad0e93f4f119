"""A case of the kernel benchmarks with its data: how it is called, backward alone too, and its results in float64."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mra_kernels
from bench.exact import exact_op
from bench.suites.kernel_cases import BACKWARD, Inputs, OpCase, as_list, meta_outputs, wanted
from mra_kernels.testing import FLOOR_ULPS, make_inputs, ulp

Function = Callable[[Inputs], list[Tensor]]

# Inputs and outputs that have a picture in their first dimension; all else are parameters.
PER_PICTURE = frozenset(
    (
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
        "gate",
        "query",
        "key",
        "value",
        "output",
    )
)

# A larger batch repeats this many pictures, so that float64 stays affordable. Three, because an address that wraps
# around at a power of two then meets another picture.
DISTINCT = 3


@dataclass(frozen=True)
class Problem:
    """A case with its data.

    Args:
        case: what is computed.
        batch: pictures.
        inputs: the op's arguments by name.
        grads: gradients of its outputs.
    """

    case: OpCase
    batch: int
    inputs: Inputs
    grads: list[Tensor]

    def names(self, direction: str) -> tuple[str, ...]:
        """What a call in this direction returns: the outputs, or the gradients of `wanted`."""
        if direction == BACKWARD:
            return tuple(f"grad_{name}" for name in wanted(self.inputs))
        returns = getattr(torch.ops.mra, self.case.op).default._schema.returns
        return tuple(value.name for value in returns[: len(self.grads)])

    def call(self, direction: str, function: Function) -> Callable[[], Sequence[Tensor]]:
        """`function`, which maps inputs to outputs, as a call without arguments; backward is `Backward`."""
        return Backward(function, self.inputs, self.grads) if direction == BACKWARD else Forward(function, self.inputs)

    def checked(self, direction: str, results: Sequence[Tensor]) -> list[Tensor]:
        """The part of a call's results that `exact` gives: the first and last pictures, and all of a parameter's."""
        rows = torch.tensor(self._pictures(), device=self.grads[0].device)
        pairs = zip(self._kinds(direction), results, strict=True)
        return [result.index_select(0, rows) if kind in PER_PICTURE else result for kind, result in pairs]

    def slack(self, direction: str) -> dict[str, float]:
        """By name of a result, what sums in float32 may be off, however exact the baseline happens to be."""
        # A result has the size of what it is the gradient of, and an output that of its gradient.
        like = [self.inputs[name] for name in wanted(self.inputs)] if direction == BACKWARD else self.grads
        largest = max(grad.numel() for grad in self.grads)
        return {
            name: FLOOR_ULPS * ulp(torch.float32) * math.sqrt(max(1, largest // tensor.numel()))
            for name, tensor in zip(self.names(direction), like, strict=True)
        }

    def exact(self, direction: str) -> list[Tensor]:
        """The same in float64: picture by picture because of the memory; the gradients of parameters add up."""
        pictures = self._pictures()
        found: dict[int, Sequence[Tensor]] = {}
        for index in range(min(self.batch, DISTINCT)) if direction == BACKWARD else {i % DISTINCT for i in pictures}:
            found[index] = self._solve_exactly(direction, index)
        counts = {index: len(range(index, self.batch, DISTINCT)) for index in found}
        results = []
        for position, kind in enumerate(self._kinds(direction)):
            if kind in PER_PICTURE:
                results.append(torch.cat([found[index % DISTINCT][position] for index in pictures]))
            else:
                results.append(torch.stack([counts[i] * of[position] for i, of in found.items()]).sum(0))
        return results

    def _solve_exactly(self, direction: str, index: int) -> Sequence[Tensor]:
        """Outputs or gradients of one picture in float64."""
        op = exact_op(self.case.op)
        inputs = {name: _in_double(name, value, index) for name, value in self.inputs.items()}
        grads = [_in_double("output", grad, index) for grad in self.grads]
        problem = Problem(self.case, 1, inputs, grads)
        return problem.call(direction, lambda given: as_list(op(*given.values())))()

    def _kinds(self, direction: str) -> list[str]:
        return wanted(self.inputs) if direction == BACKWARD else ["output"] * len(self.grads)

    def _pictures(self) -> list[int]:
        return list(range(self.batch)) if self.batch <= DISTINCT else [0, self.batch - 2, self.batch - 1]


class Forward:
    """A forward without autograd, as a call.

    Args:
        function: from inputs to outputs.
        inputs: by name.
    """

    def __init__(self, function: Function, inputs: Inputs) -> None:
        self._function = function
        self._inputs = inputs

    @torch.no_grad()
    def __call__(self) -> list[Tensor]:
        """The outputs."""
        return self._function(self._inputs)


class Backward:
    """A backward alone, as a call: autograd over a graph that the first call records and that is kept.

    Args:
        function: from inputs to outputs, differentiable.
        inputs: by name.
        grads: of the outputs.
    """

    def __init__(self, function: Function, inputs: Inputs, grads: Sequence[Tensor]) -> None:
        names = wanted(inputs)
        self._function = function
        self._inputs = {n: v.detach().requires_grad_() if n in names else v for n, v in inputs.items()}
        self._leaves = [self._inputs[name] for name in names]
        self._grads = list(grads)
        self._outputs: list[Tensor] | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        """The gradients of `wanted(inputs)`, in that order."""
        if self._outputs is None:
            self._outputs = self._forward()
        return torch.autograd.grad(self._outputs, self._leaves, self._grads, retain_graph=True)

    @torch.enable_grad()
    def _forward(self) -> list[Tensor]:
        if not self._leaves[0].is_cuda:
            return self._function(self._inputs)
        # Autograd runs a node on the stream of its forward, and only the capture's own stream can be captured.
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self._function(self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs


def make_problem(case: OpCase, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Random inputs, parameters and gradients; a batch beyond `DISTINCT` repeats its pictures."""
    distinct = min(batch, DISTINCT)
    inputs = make_inputs(case.op, *case.sizes(distinct), dtype=dtype, device=device, seed=1, eps=case.eps)
    generator = torch.Generator().manual_seed(2)
    grads = [
        torch.randn(output.shape, generator=generator).to(device, output.dtype)
        for output in meta_outputs(case, distinct, dtype)
    ]
    if batch > distinct:
        rows = torch.arange(batch, device=device) % distinct
        repeated = {name: value[rows] for name, value in inputs.items() if name in PER_PICTURE and value is not None}
        inputs = inputs | repeated
        grads = [grad[rows] for grad in grads]
    return Problem(case, batch, inputs, grads)


def served_by(op: str, backend: str) -> Function:
    """The public function under one backend, from inputs to outputs."""
    public: Callable[..., Any] = getattr(mra_kernels, op)

    def function(inputs: Inputs) -> list[Tensor]:
        with mra_kernels.use_backend(backend):
            return as_list(public(*inputs.values()))

    return function


def _in_double(name: str, value: Any, index: int) -> Any:
    """One picture of a tensor that has pictures, all of another, in float64."""
    if not isinstance(value, Tensor):
        return value
    return (value[index : index + 1] if name in PER_PICTURE else value).double()


def _capture_stream() -> Any:
    """The stream on which `torch.cuda.graph` captures unless told otherwise."""
    graph: Any = torch.cuda.graph
    if graph.default_capture_stream is None:
        graph.default_capture_stream = torch.cuda.Stream()
    return graph.default_capture_stream
