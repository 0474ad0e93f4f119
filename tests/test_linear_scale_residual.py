"""`linear_scale_residual`: what every op must do, with and without its layer scale."""

from typing import ClassVar

import torch
from op_calls import Route, call
from op_suite import OpSuite


class TestLinearScaleResidual(OpSuite):
    op = "linear_scale_residual"
    summed = ("x", "weight", "bias", "residual")
    products = ("x", "weight")
    local_gradients = ("x", "residual")
    # batch and positions, inputs, outputs, with a scale
    shapes: ClassVar = [
        ((2, 9, 8), 24, 16, True),
        ((3, 5, 7), 24, 16, True),
        ((2, 11), 24, 16, False),
        ((5,), 24, 16, True),
        ((), 24, 16, True),
        ((0, 7), 8, 8, True),
        ((2, 0), 8, 8, False),
        ((1, 1), 1, 1, True),
        ((2, 3, 3), 3, 17, True),
        ((1, 13, 2), 40, 3, False),
        ((1, 49), 768, 192, True),
    ]

    def test_scale_zero_leaves_the_residual(self, route: Route) -> None:
        """How a block starts in training, but for 1e-6: bitwise the identity."""
        inputs = self.make(self.shapes[0], route, seed=20)
        inputs["scale"] = torch.zeros_like(inputs["scale"])
        assert torch.equal(call(self.op, route.backend, inputs)[0], inputs["residual"])

    def test_the_residual_is_not_written_to(self, route: Route) -> None:
        inputs = self.make(self.shapes[0], route, seed=21)
        before = inputs["residual"].clone()
        call(self.op, route.backend, inputs)
        assert torch.equal(inputs["residual"], before)
