"""`project_mean`: what every op must do, without a base, and that it is the mean of a projection."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from op_calls import Route, call, check, make_grad_outputs
from op_suite import OpSuite

from mra_kernels.testing import relative_error


class TestProjectMean(OpSuite):
    op = "project_mean"
    local_gradients = ("hidden_mean", "base_mean")
    # batch, inputs, outputs, whether there is a base
    shapes: ClassVar = [
        (3, 16, 8),
        (5, 16, 8),
        (0, 16, 8),
        (1, 1, 1),
        (2, 3, 17, False),
        (1, 40, 20),
        (2, 300, 5, False),
        (1, 2100, 3),
        (7, 17, 33),
        (4, 192, 96),
    ]

    def test_of_a_projection(self, float32_route: Route) -> None:
        """mean(base + hidden W^T + b), from the means of both."""
        inputs = self.make((2, 24, 12), float32_route, seed=20)
        hidden, base = torch.randn(2, 9, 24).to(float32_route.device), torch.randn(2, 9, 12).to(float32_route.device)
        (y,) = call(self.op, float32_route.backend, inputs | {"hidden_mean": hidden.mean(1), "base_mean": base.mean(1)})
        expected = (base + F.linear(hidden, inputs["weight"], inputs["bias"])).mean(1)
        assert relative_error(y, expected) < 1e-6

    def test_means_keep_their_precision(self, route: Route) -> None:
        """Narrow weights do not round the means."""
        inputs = self.make((2, 24, 12), route, seed=21)
        moved = inputs | {"hidden_mean": inputs["hidden_mean"] + 2**-12}
        before, after = (call(self.op, route.backend, given)[0] for given in (inputs, moved))
        expected = 2**-12 * inputs["weight"].float().sum(1)
        assert relative_error(after - before, expected.expand_as(after)) < 2e-3

    def test_without_a_base(self, route: Route) -> None:
        inputs = self.make((2, 24, 12, False), route, seed=22)
        assert inputs["base_mean"] is None
        check(self.op, route, inputs, make_grad_outputs(self.op, inputs))
