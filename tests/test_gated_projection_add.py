"""`gated_projection_add`: what every op must do, and its gate."""

from typing import ClassVar

import torch
from op_calls import Route, call
from op_suite import OpSuite


class TestGatedProjectionAdd(OpSuite):
    op = "gated_projection_add"
    local_gradients = ("low", "low_hidden", "high_hidden")
    # batch and positions, outputs, low inputs, high inputs
    shapes: ClassVar = [
        ((2, 9, 8), 16, 24, 12),
        ((3, 5, 7), 16, 24, 12),
        ((2, 11), 16, 24, 12),
        ((5,), 16, 24, 12),
        ((0, 7), 8, 8, 8),
        ((2, 0), 8, 8, 8),
        ((1, 1), 1, 1, 1),
        ((2, 3, 3), 3, 17, 5),
        ((1, 13, 2), 40, 3, 1),
        ((1, 49), 192, 192, 384),
    ]

    def test_gate_zero_leaves_the_low_path(self, float32_route: Route) -> None:
        inputs = self.make(self.shapes[0], float32_route, seed=20)
        inputs["gate"] = torch.zeros_like(inputs["gate"])
        other = inputs | {"high_weight": inputs["high_weight"] * 2, "high_bias": inputs["high_bias"] + 1}
        a, b = (call(self.op, float32_route.backend, i)[0] for i in (inputs, other))
        assert torch.equal(a, b)

    def test_each_picture_has_its_own_gate(self, float32_route: Route) -> None:
        inputs = self.make(self.shapes[0], float32_route, seed=21)
        (together,) = call(self.op, float32_route.backend, inputs)
        for i in range(2):
            maps = ("low", "low_hidden", "high_hidden", "gate")
            alone = inputs | {n: inputs[n][i : i + 1] for n in maps}
            torch.testing.assert_close(call(self.op, float32_route.backend, alone)[0], together[i : i + 1])
