"""What every op must do, whichever it is: a test file names the op and its shapes and inherits the rest."""

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from op_calls import (
    BACKENDS,
    KERNELS,
    REGISTERED,
    Route,
    as_tuple,
    backward_arguments,
    backward_names,
    call,
    check,
    differentiable,
    lay_out,
    make_grad_outputs,
    routes,
    solve_exactly,
    threads,
)
from op_transforms import TransformSuite
from torch import Tensor

import mra_kernels
from mra_kernels.testing import LAYOUTS, make_inputs

# Which routes a test takes, by the name of its parameter.
ROUTES: dict[str, tuple] = {
    "route": (),
    "float32_route": (BACKENDS, (torch.float32,)),
    "autocast_route": (("reference", *KERNELS), (torch.bfloat16,)),
    "registered": (REGISTERED, (torch.float32,)),
    "kernel": (KERNELS,),
}


class OpSuite(TransformSuite):
    """Values, gradients, layouts, edge values, refusals; compilers and exporters come from `TransformSuite`.

    `shapes` are arguments of `make_inputs`; the first two are small and ordinary.
    """

    shapes: ClassVar[list[tuple]]
    # Inputs that meet in the library's product, where an op has one, and gradients that are its products.
    summed: ClassVar[tuple[str, ...]] = ()
    products: ClassVar[tuple[str, ...]] = ()

    @pytest.fixture(scope="class", autouse=True)
    def _one_thread(self) -> Iterator[None]:
        """Tensors are tiny, and threads that wait for a busy machine are not; `test_repeats_bitwise` takes more."""
        with threads(1):
            yield

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for name, which in ROUTES.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, routes(self.op, *which), ids=str)
        if "dims" in metafunc.fixturenames:
            metafunc.parametrize("dims", self.shapes, ids=str)
        if "small" in metafunc.fixturenames:
            metafunc.parametrize("small", self.shapes[:2], ids=str)
        if "layout" in metafunc.fixturenames:
            metafunc.parametrize("layout", LAYOUTS)
        if "argument" in metafunc.fixturenames:
            inputs = make_inputs(self.op, *self.shapes[0])
            metafunc.parametrize("argument", [n for n, v in inputs.items() if isinstance(v, Tensor)])

    def make(self, dims: tuple, route: Route | None = None, **options: Any) -> dict[str, Any]:
        if route is not None:
            options |= {"dtype": route.dtype, "device": route.device}
        return make_inputs(self.op, *dims, **options)

    def test_values_and_gradients(self, dims: tuple, route: Route) -> None:
        inputs = self.make(dims, route)
        check(self.op, route, inputs, make_grad_outputs(self.op, inputs))

    def test_layout(self, small: tuple, layout: str, route: Route) -> None:
        inputs = lay_out(self.make(small, route, seed=2), layout)
        check(self.op, route, inputs, make_grad_outputs(self.op, inputs, layout=layout))

    def test_gradients_of_subsets(self, route: Route) -> None:
        """Each gradient alone is what it is among the others."""
        inputs = self.make(self.shapes[0], route, seed=3)
        for name in differentiable(self.op, inputs):
            check(self.op, route, inputs, make_grad_outputs(self.op, inputs), [name])

    def test_backward_skips_what_nobody_needs(self, route: Route) -> None:
        inputs = self.make(self.shapes[0], route, seed=3)
        backend = route.schema_backend
        arguments = backward_arguments(self.op, backend, inputs, make_grad_outputs(self.op, inputs))
        backward = getattr(torch.ops.mra, f"{self.op}_backward")
        names = backward_names(self.op)
        together = as_tuple(backward(*arguments, [True] * len(names), backend))
        for i in range(len(names) + 1):
            alone = as_tuple(backward(*arguments, [i == j for j in range(len(names))], backend))
            for j, grad in enumerate(alone):
                if i == j:
                    torch.testing.assert_close(grad, together[j])
                else:
                    assert grad.numel() == 0, f"{names[j]} was computed, only number {i} is needed"

    def test_repeats_bitwise(self, kernel: Route) -> None:
        """A kernel's result depends neither on the run nor on the number of threads.

        Library code promises neither: what it sums has few bits here, exact in any order, and the gradients that are
        its products are not compared.
        """
        inputs = self.make(self.shapes[-1], kernel, seed=4)
        inputs |= {name: (64 * inputs[name]).round() / 64 for name in self.summed}
        grad_outputs = make_grad_outputs(self.op, inputs)
        runs = []
        for number in (1, 2, 3, 2, 1):
            with threads(number):
                solution = check(self.op, kernel, inputs, grad_outputs)
            grads = [grad for name, grad in solution.grads.items() if name not in self.products]
            runs.append([*solution.outputs, *grads])
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))

    def test_nan_stays_local(self, argument: str, route: Route) -> None:
        """One NaN in one input, and one in the gradient: every output is NaN where the formula reads it, only there."""
        inputs = self.make(self.shapes[0], route, seed=6)
        grad_outputs = make_grad_outputs(self.op, inputs)
        if argument == "mean_weights":
            pytest.skip("weights of a mean reach every picture")
        inputs[argument] = _poison(inputs[argument], float("nan"))
        exact = solve_exactly(self.op, inputs, grad_outputs, differentiable(self.op, inputs))
        for actual, expected in zip(call(self.op, route.backend, inputs), exact.outputs, strict=True):
            self.assert_nan_where(actual, expected)

    def assert_nan_where(self, actual: Tensor, expected: Tensor) -> None:
        assert torch.equal(actual.isnan(), expected.isnan())

    def test_nan_gradient_stays_local(self, route: Route) -> None:
        inputs = self.make(self.shapes[0], route, seed=7)
        first, *others = make_grad_outputs(self.op, inputs)
        grad_outputs = (_poison(first, float("nan")), *others)
        data = [n for n in differentiable(self.op, inputs) if n in self.local_gradients]
        exact = solve_exactly(self.op, inputs, grad_outputs, data).grads
        actual = self.solve(route, inputs, grad_outputs, data).grads
        for name in data:
            assert not exact[name].isnan().all(), f"{name}: the case shows nothing"
            assert torch.equal(actual[name].isnan(), exact[name].isnan()), name

    def test_infinity_stays_local(self, route: Route) -> None:
        """An infinity in the first input makes NaN or infinity only where a NaN would."""
        inputs = self.make(self.shapes[0], route, seed=6)
        first = next(iter(inputs))
        nan, infinity = dict(inputs), dict(inputs)
        nan[first] = _poison(inputs[first], float("nan"))
        infinity[first] = _poison(inputs[first], float("inf"))
        reached = call(self.op, route.backend, nan)
        for actual, mask in zip(call(self.op, route.backend, infinity), reached, strict=True):
            assert not (~actual.isfinite() & ~mask.isnan()).any()

    def test_autocast_computes_in_its_dtype(self, small: tuple, autocast_route: Route) -> None:
        """Under autocast an op does what it does on tensors that were cast by hand; gradients keep their dtypes."""
        route = autocast_route
        cast = self.make(small, route, seed=8)
        wide = {n: v.float() if isinstance(v, Tensor) else v for n, v in cast.items()}
        expected = call(self.op, route.backend, cast)
        with torch.autocast(route.device, torch.bfloat16):
            actual = call(self.op, route.backend, wide)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == e.dtype
            torch.testing.assert_close(a, e)
        wanted = differentiable(self.op, wide)
        with torch.autocast(route.device, torch.bfloat16):
            solution = self.solve(route, wide, make_grad_outputs(self.op, cast), wanted)
        assert {g.dtype for g in solution.grads.values()} == {torch.float32}

    def test_wrong_shape_names_the_argument(self, argument: str) -> None:
        inputs = self.make(self.shapes[0])
        wrong = inputs[argument].new_zeros((*inputs[argument].shape, 5))
        with pytest.raises(ValueError, match=f"^{self.op}: ") as caught:
            getattr(mra_kernels, self.op)(*(inputs | {argument: wrong}).values())
        assert str(tuple(wrong.shape)) in str(caught.value) or argument in str(caught.value)

    def test_scalar_instead_of_a_tensor_is_refused(self, argument: str) -> None:
        inputs = self.make(self.shapes[0])
        with pytest.raises(ValueError, match=f"^{self.op}: "):
            getattr(mra_kernels, self.op)(*(inputs | {argument: torch.zeros((), dtype=torch.float32)}).values())

    def test_wrong_dtype_names_the_argument(self, argument: str) -> None:
        inputs = self.make(self.shapes[0])
        wrong = inputs | {argument: inputs[argument].double()}
        with pytest.raises(TypeError, match=f"^{self.op}: .*torch.float64"):
            getattr(mra_kernels, self.op)(*wrong.values())

    def test_integers_are_refused(self) -> None:
        integers = {n: v.long() if isinstance(v, Tensor) else v for n, v in self.make(self.shapes[0]).items()}
        with pytest.raises(TypeError, match=f"^{self.op}: .*must be floating point, but is torch.int64"):
            getattr(mra_kernels, self.op)(*integers.values())

    def test_two_devices_are_refused(self, argument: str) -> None:
        inputs = self.make(self.shapes[0])
        with pytest.raises(ValueError, match=f"^{self.op}: .* is on .*(meta|cpu)"):
            getattr(mra_kernels, self.op)(*(inputs | {argument: inputs[argument].to("meta")}).values())

    def test_a_backend_that_cannot_serve_says_why(self) -> None:
        inputs = self.make(self.shapes[0], dtype=torch.float64)
        for backend in ("native", "triton"):
            with mra_kernels.use_backend(backend), pytest.raises(mra_kernels.BackendUnavailable) as caught:
                getattr(mra_kernels, self.op)(*inputs.values())
            assert self.op in str(caught.value)
            assert f"{backend}: " in str(caught.value)


def _poison(x: Tensor, value: float) -> Tensor:
    """One element in the middle of the first picture replaced."""
    x = x.clone()
    x[tuple(min(n - 1, n // 2) if i else 0 for i, n in enumerate(x.shape))] = value
    return x
