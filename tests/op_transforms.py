"""What PyTorch does with an op: registration checks, gradcheck, compilers, export, tensors without data."""

from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from op_calls import (
    KEPT,
    Bound,
    Route,
    as_tuple,
    backward_arguments,
    backward_names,
    call,
    call_operator,
    differentiable,
    is_data,
    lay_out,
    make_grad_outputs,
    operator_arguments,
    solve,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from mra_kernels.testing import make_inputs, relative_error

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


class TransformSuite:
    """Inherited by `OpSuite`."""

    op: ClassVar[str]
    shapes: ClassVar[list[tuple]]
    local_gradients: ClassVar[tuple[str, ...]]
    # torch 2.13's inductor cannot train library convolutions of dynamic sizes: over channels-last maps it fails
    # ("cannot determine truth value of Relational"), over pixels it fixes the sides. It compiles inference of those.
    inductor_trains: ClassVar[bool] = True

    def solve(self, route: Route, inputs: dict[str, Any], grad_outputs: tuple[Tensor, ...], wanted: list[str]) -> Any:
        return solve(partial(call, self.op, route.backend), inputs, grad_outputs, wanted)

    def test_opcheck(self, small: tuple, layout: str, registered: Route) -> None:
        route, backend = registered, registered.schema_backend
        inputs = lay_out(make_inputs(self.op, *small, device=route.device, seed=9), layout)
        tests = OPCHECKS if layout != "sliced" else (*OPCHECKS, "test_aot_dispatch_dynamic")
        for name in differentiable(self.op, inputs):
            inputs[name] = inputs[name].detach().requires_grad_()
        opcheck(
            getattr(torch.ops.mra, self.op).default,
            operator_arguments(self.op, inputs.values(), backend),
            test_utils=tests,
        )

    def test_opcheck_backward(self, small: tuple, registered: Route) -> None:
        route, backend = registered, registered.schema_backend
        inputs = make_inputs(self.op, *small, device=route.device, seed=9)
        arguments = backward_arguments(self.op, backend, inputs, make_grad_outputs(self.op, inputs))
        needs = [i != 1 for i in range(len(backward_names(self.op)))]
        op = getattr(torch.ops.mra, f"{self.op}_backward").default
        opcheck(op, (*arguments, needs, backend), test_utils=("test_schema", "test_faketensor"))

    @pytest.mark.parametrize("backend", ["reference", "operator"])
    def test_gradcheck(self, small: tuple, backend: str) -> None:
        inputs = make_inputs(self.op, *small, dtype=torch.float64, seed=10)
        names = differentiable(self.op, inputs)

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            return call(self.op, backend, inputs | dict(zip(names, values, strict=True)))

        leaves = tuple(inputs[n].requires_grad_() for n in names)
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)

    @pytest.mark.parametrize(
        ("backend", "compiler"), [("auto", "inductor"), ("auto", "aot_eager"), ("operator", "aot_eager")]
    )
    def test_compile(self, backend: str, compiler: str) -> None:
        """One graph for every batch and size; outputs and gradients are those of eager execution."""
        torch._dynamo.reset()
        module = Bound(self.op, backend, make_inputs(self.op, *self.shapes[0], seed=11))
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=compiler)
        trains = compiler != "inductor" or self.inductor_trains
        for i, dims in enumerate(self.shapes[:2]):
            data = list(self._data(dims, seed=12 + i).values())
            with torch._dynamo.config.patch(error_on_recompile=i > 0), torch.set_grad_enabled(trains):
                actual = self._run(compiled, module, data)
                expected = self._run(module, module, data)
            for a, e in zip(actual, expected, strict=True):
                assert relative_error(a, e) < 1e-5

    def _data(self, dims: tuple, seed: int) -> dict[str, Tensor]:
        inputs = make_inputs(self.op, *dims, seed=seed)
        data = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and is_data(n)}
        return {n: v.requires_grad_(n != "mean_weights") for n, v in data.items()}

    def _run(self, function: Any, module: Bound, data: list[Tensor]) -> list[Tensor]:
        """Outputs, then gradients of all maps and parameters for a random gradient of each output."""
        outputs = [o for o in function(*data) if o.numel()]
        if not torch.is_grad_enabled():
            return outputs
        leaves = [*[d for d in data if d.requires_grad], *module.parameters()]
        generator = torch.Generator().manual_seed(17)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [_noise(o, generator) for o in outputs])]

    @pytest.mark.parametrize("backend", ["auto", "operator"])
    def test_export(self, backend: str) -> None:
        """An exported module gives the same result, also at other sizes."""
        module = Bound(self.op, backend, make_inputs(self.op, *self.shapes[0], seed=13))
        data = self._data(self.shapes[0], seed=14)
        # A map's last dimension is its channels, which the parameters fix; pixels have their planes second.
        fixed = [1 if n == "pixels" else v.dim() - 1 if v.dim() > 1 else None for n, v in data.items()]
        dynamic = [
            {i: torch.export.Dim.AUTO for i in range(v.dim()) if i != f}
            for f, v in zip(fixed, data.values(), strict=True)
        ]
        program = torch.export.export(module, tuple(data.values()), dynamic_shapes=(tuple(dynamic),))
        for dims in self.shapes[:2]:
            data = self._data(dims, seed=15)
            expected = module(*data.values())
            for a, e in zip(program.module()(*data.values()), expected, strict=True):
                assert relative_error(a, e) < 1e-5

    @pytest.mark.parametrize("backend", ["reference", "native"])
    def test_meta_and_fake_cuda(self, backend: str) -> None:
        """Shapes, dtypes and devices without data, forward and backward op, on devices that are not there."""
        inputs = make_inputs(self.op, *self.shapes[0], dtype=torch.bfloat16)
        grad_outputs = make_grad_outputs(self.op, inputs)
        real = backward_arguments(self.op, "reference", inputs, grad_outputs)
        needs = [True] * len(backward_names(self.op))
        expected = call(self.op, "operator", inputs)
        for device in ("meta", "cuda"):
            with FakeTensorMode():
                there = {n: _empty_like(v, device) for n, v in inputs.items()}
                outputs = call_operator(self.op, there.values(), backend)
                arguments = [_empty_like(v, device) for v in real]
                grads = as_tuple(getattr(torch.ops.mra, f"{self.op}_backward")(*arguments, needs, backend))
            for a, e in zip(outputs, expected, strict=False):
                assert (a.shape, a.dtype, a.device.type) == (e.shape, e.dtype, device)
            for name, grad in zip(backward_names(self.op), grads, strict=True):
                assert (grad.shape, grad.dtype, grad.device.type) == (inputs[name].shape, inputs[name].dtype, device)

    def test_traces_for_cuda_without_one(self) -> None:
        """A graph for CUDA tensors can be captured where there is no GPU."""
        torch._dynamo.reset()
        with FakeTensorMode(), torch.no_grad():
            inputs = {n: _empty_like(v, "cuda") for n, v in make_inputs(self.op, *self.shapes[0]).items()}
            compiled = torch.compile(getattr(torch.ops.mra, self.op), backend="aot_eager", fullgraph=True)
            outputs = as_tuple(compiled(*operator_arguments(self.op, inputs.values(), "native")))
            assert {o.device.type for o in outputs} == {"cuda"}

    def test_second_derivative_is_refused(self) -> None:
        """A kernel has no second derivative; that must be an error, never a silent zero. The reference has one."""
        inputs = make_inputs(self.op, *self.shapes[0], dtype=torch.float64, seed=16)
        names = differentiable(self.op, inputs)
        for name in names:
            inputs[name].requires_grad_()
        leaves = [inputs[n] for n in names]
        for square in (True, False):
            # A square's gradient depends on the output; a sum's on what the op saved, alone.
            for backend in ("reference", "operator"):
                outputs = call(self.op, backend, inputs)
                loss = torch.stack([(o.square() if square else o).sum() for o in outputs]).sum()
                first = torch.autograd.grad(loss, leaves, create_graph=True)
                norm = torch.stack([g.square().sum() for g in first]).sum()
                if backend == "reference":
                    second = torch.autograd.grad(norm, leaves, materialize_grads=True)
                    assert any(g.abs().sum() > 0 for g in second)
                else:
                    with pytest.raises(RuntimeError, match=f"{self.op}.*use_backend"):
                        torch.autograd.grad(norm, leaves)

    def test_statistics_have_no_gradient(self) -> None:
        """What a forward op keeps for its backward is not differentiable, so nobody gets a wrong gradient of it."""
        inputs = make_inputs(self.op, *self.shapes[0])
        for name in differentiable(self.op, inputs):
            inputs[name].requires_grad_()
        names = [r.name for r in getattr(torch.ops.mra, self.op).default._schema.returns]
        outputs = call_operator(self.op, inputs.values(), "reference")
        for name, output in zip(names, outputs, strict=True):
            assert output.requires_grad == (name not in KEPT)


def _noise(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype)


def _empty_like(value: Any, device: str) -> Any:
    """A tensor of the same shape and dtype on a device that need not exist."""
    return torch.empty(value.shape, dtype=value.dtype, device=device) if isinstance(value, Tensor) else value
