"""`adapter_gate`: what every op must do, and its range."""

from typing import ClassVar

import torch
from op_calls import Route, call
from op_suite import OpSuite


class TestAdapterGate(OpSuite):
    op = "adapter_gate"
    local_gradients = ("low_mean", "high_mean")
    # batch, channels, hidden
    shapes: ClassVar = [
        (3, 16, 8),
        (5, 16, 8),
        (0, 16, 8),
        (1, 1, 1),
        (2, 3, 17),
        (1, 40, 20),
        (2, 192, 96),
        (7, 17, 3),
    ]

    def test_saturates_at_one(self, float32_route: Route) -> None:
        """tanh of a large number is 1, with gradient 0, not NaN."""
        inputs = self.make(self.shapes[0], float32_route, seed=20)
        inputs["down_bias"] = torch.full_like(inputs["down_bias"], 1e4).requires_grad_()
        (gate,) = call(self.op, float32_route.backend, inputs)
        assert (gate == 1).all()
        assert torch.autograd.grad(gate.sum(), inputs["down_bias"])[0].item() == 0
