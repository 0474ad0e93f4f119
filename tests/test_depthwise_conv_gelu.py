"""`depthwise_conv_gelu`: what every op must do, and its means."""

from typing import ClassVar

import torch
from op_calls import Route, call, check, make_grad_outputs
from op_suite import OpSuite


class TestDepthwiseConvGelu(OpSuite):
    op = "depthwise_conv_gelu"
    local_gradients = ("x",)
    inductor_trains = False
    # batch, height, width, channels
    shapes: ClassVar = [
        (2, 9, 8, 16),
        (3, 5, 7, 16),
        (0, 4, 5, 8),
        (1, 1, 1, 1),
        (1, 7, 7, 3),
        (2, 1, 9, 17),
        (1, 13, 2, 40),
        (1, 3, 4, 192),
        (3, 2, 1, 1),
        (1, 17, 19, 24),
    ]

    def test_each_output_alone(self, float32_route: Route) -> None:
        """A loss may use any one of the three outputs."""
        inputs = self.make(self.shapes[0], float32_route, seed=20)
        gradients = make_grad_outputs(self.op, inputs)
        for i in range(3):
            alone = tuple(g if i == j else torch.zeros_like(g) for j, g in enumerate(gradients))
            check(self.op, float32_route, inputs, alone)

    def test_mean_far_from_zero(self, float32_route: Route) -> None:
        inputs = self.make((2, 5, 6, 24), float32_route, seed=21)
        inputs["x"] = inputs["x"] + 1e4
        check(self.op, float32_route, inputs, make_grad_outputs(self.op, inputs))

    def test_gelu_saturates(self, route: Route) -> None:
        """Far below zero GELU is 0, not the NaN of infinity times zero; far above it is the identity."""
        inputs = self.make((1, 4, 4, 8), route, seed=22)
        inputs["weight"] = torch.zeros_like(inputs["weight"])
        for bias, expected in ((-300.0, 0.0), (300.0, 300.0)):
            inputs["bias"] = torch.full_like(inputs["bias"], bias)
            assert (call(self.op, route.backend, inputs)[0] == expected).all()
