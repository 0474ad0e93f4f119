"""`depthwise_conv_norm`: what every op must do, and the edges of its LayerNorm."""

from typing import ClassVar

import torch
from op_calls import Route, call, check, make_grad_outputs
from op_suite import OpSuite


class TestDepthwiseConvNorm(OpSuite):
    op = "depthwise_conv_norm"
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

    def test_mean_far_from_zero(self, float32_route: Route) -> None:
        """A variance from E[x^2] - E[x]^2 loses every digit here. 16-bit inputs cannot hold such a case."""
        inputs = self.make((2, 5, 6, 24), float32_route, seed=20)
        inputs["bias"] = inputs["bias"] + 1e4
        check(self.op, float32_route, inputs, make_grad_outputs(self.op, inputs))

    def test_constant_channels_give_the_bias(self, route: Route) -> None:
        """Variance 0: the normalised value is 0, so the result is `norm_bias`; the library's but for rounding / eps."""
        inputs = self.make((2, 5, 6, 24), route, seed=21)
        inputs["weight"] = inputs["weight"].zero_()
        inputs["bias"] = torch.full_like(inputs["bias"], 3.0)
        (y,) = call(self.op, route.backend, inputs)
        expected = inputs["norm_bias"].expand_as(y)
        assert torch.equal(y, expected) if route.is_kernel else (y - expected).abs().max() < 2e-3

    def test_eps_counts(self, route: Route) -> None:
        inputs = self.make((2, 5, 6, 24), route, seed=22, eps=0.5)
        check(self.op, route, inputs, make_grad_outputs(self.op, inputs))
