"""`add_norm`: what every op must do, the sum itself, and the edges of its LayerNorm."""

from typing import ClassVar

import pytest
import torch
from op_calls import Route, call, check, make_grad_outputs
from op_suite import OpSuite

import mra_kernels
from mra_kernels.testing import make_inputs


class TestAddNorm(OpSuite):
    op = "add_norm"
    local_gradients = ("x", "delta")
    # leading sizes, channels
    shapes: ClassVar = [
        ((2, 9), 16),
        ((3, 5), 16),
        ((0, 4), 8),
        ((1,), 1),
        ((7,), 3),
        ((), 24),
        ((2, 1, 3), 17),
        ((3, 5, 2), 192),
        ((1, 3), 1024),
        ((2, 150), 40),
    ]

    def test_the_sum_is_the_library_s(self, route: Route) -> None:
        """Bit for bit, since it is the residual stream of the layers that follow."""
        inputs = self.make(((2, 9), 24), route)
        total, y = call(self.op, route.backend, inputs)
        assert torch.equal(total, inputs["x"] + inputs["delta"])
        assert total.data_ptr() != inputs["x"].data_ptr()
        assert y.data_ptr() != total.data_ptr()

    def test_the_norm_is_the_rounded_sum_s(self, route: Route) -> None:
        """As eager PyTorch has it: what the sum loses by rounding, the norm does not see either."""
        inputs = self.make(((4, 8), 24), route, seed=20)
        inputs["x"] = 64 * inputs["x"].sign()
        total, y = call(self.op, route.backend, inputs)
        again = call(self.op, route.backend, inputs | {"x": total, "delta": torch.zeros_like(total)})
        assert torch.equal(again[1], y)

    def test_both_summands_have_one_gradient(self, route: Route) -> None:
        inputs = self.make(((2, 9), 24), route, seed=21)
        grads = check(self.op, route, inputs, make_grad_outputs(self.op, inputs)).grads
        assert torch.equal(grads["x"], grads["delta"])

    def test_each_output_alone(self, float32_route: Route) -> None:
        """A loss may use one of the two; without the norm the gradient is the sum's."""
        inputs = self.make(((2, 9), 24), float32_route, seed=22)
        gradients = make_grad_outputs(self.op, inputs)
        for i in range(2):
            alone = tuple(g if i == j else torch.zeros_like(g) for j, g in enumerate(gradients))
            grads = check(self.op, float32_route, inputs, alone).grads
        assert not grads["x"].equal(gradients[0])

    def test_a_row_of_one_gradient(self, route: Route) -> None:
        """A constant gradient of the norm, with a constant weight, moves no row: LayerNorm ignores such a shift."""
        inputs = self.make(((3, 4), 64), route, seed=23)
        inputs["norm_weight"] = torch.ones_like(inputs["norm_weight"])
        grad_sum, grad_y = make_grad_outputs(self.op, inputs)
        grads = check(self.op, route, inputs, (torch.zeros_like(grad_sum), torch.ones_like(grad_y))).grads
        assert grads["x"].abs().max() < 0.02

    def test_mean_far_from_zero(self, float32_route: Route) -> None:
        inputs = self.make(((2, 24), 24), float32_route, seed=24)
        inputs["x"] = inputs["x"] + 1e4
        check(self.op, float32_route, inputs, make_grad_outputs(self.op, inputs))

    def test_constant_rows_give_the_bias(self, route: Route) -> None:
        inputs = self.make(((2, 24), 24), route, seed=25)
        inputs["x"] = torch.full_like(inputs["x"], 3.0)
        inputs["delta"] = torch.full_like(inputs["x"], -1.0)
        _, y = call(self.op, route.backend, inputs)
        expected = inputs["norm_bias"].expand_as(y)
        assert torch.equal(y, expected) if route.is_kernel else (y - expected).abs().max() < 2e-3

    def test_eps_counts(self, route: Route) -> None:
        inputs = self.make(((2, 24), 24), route, seed=26, eps=0.5)
        check(self.op, route, inputs, make_grad_outputs(self.op, inputs))

    def test_no_channels_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"add_norm: x must be \[\.\.\., C\] .* shape \(2, 0\)"):
            mra_kernels.add_norm(*make_inputs(self.op, (2,), 0).values())
