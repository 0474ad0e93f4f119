"""`linear_gelu`: what every op must do, with and without its weighted mean."""

from typing import ClassVar

import pytest
import torch
from op_calls import DTYPES, Route, call, check, check_every_gelu, make_grad_outputs, routes
from op_suite import OpSuite

import mra_kernels
from mra_kernels.testing import make_inputs


class TestLinearGelu(OpSuite):
    op = "linear_gelu"
    summed = ("x", "weight", "bias")
    products = ("x", "weight")
    local_gradients = ("x",)
    # batch and positions, inputs, outputs, with a mean
    shapes: ClassVar = [
        ((2, 9, 8), 24, 16, True),
        ((3, 5, 7), 24, 16, True),
        ((2, 11), 24, 16, False),
        ((5,), 24, 16, False),
        ((0, 7), 8, 8, True),
        ((0, 7), 8, 8, False),
        ((2, 0), 8, 8, True),
        ((1, 1), 1, 1, True),
        ((2, 3, 3), 3, 17, True),
        ((1, 13, 2), 40, 3, False),
        ((1, 49), 192, 768, True),
    ]

    def test_each_output_alone(self, float32_route: Route) -> None:
        inputs = self.make(self.shapes[0], float32_route, seed=20)
        y, mean = make_grad_outputs(self.op, inputs)
        check(self.op, float32_route, inputs, (y, torch.zeros_like(mean)))
        check(self.op, float32_route, inputs, (torch.zeros_like(y), mean))

    def test_mean_weights_have_no_gradient(self, float32_route: Route) -> None:
        """They follow from the grids alone; every backend leaves them out, as the docstring says."""
        inputs = self.make(self.shapes[0], float32_route, seed=21)
        inputs["mean_weights"].requires_grad_()
        mean = call(self.op, float32_route.backend, inputs | {"x": inputs["x"].requires_grad_()})[1]
        grads = torch.autograd.grad(mean.sum(), [inputs["x"], inputs["mean_weights"]], allow_unused=True)
        assert grads[0].abs().sum() > 0
        assert grads[1] is None

    def test_gelu_saturates(self, route: Route) -> None:
        inputs = self.make(((2, 3), 4, 8), route, seed=22)
        inputs["weight"] = torch.zeros_like(inputs["weight"])
        for bias, expected in ((-300.0, 0.0), (300.0, 300.0)):
            inputs["bias"] = torch.full_like(inputs["bias"], bias)
            assert (call(self.op, route.backend, inputs)[0] == expected).all()

    def test_mean_needs_positions(self) -> None:
        inputs = make_inputs(self.op, (3,), 4, 5) | {"mean_weights": torch.ones(3)}
        with pytest.raises(ValueError, match=r"mean_weights need positions.*\(3, 4\)"):
            mra_kernels.linear_gelu(*inputs.values())


@pytest.mark.parametrize("route", routes("linear_gelu", dtypes=DTYPES[1:]), ids=str)
def test_every_16_bit_number(route: Route) -> None:
    check_every_gelu(route)
