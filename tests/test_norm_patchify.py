"""`norm_patchify`: what every op must do, odd sides and the edges of its LayerNorm."""

from typing import ClassVar

import pytest
import torch
from op_calls import Route, call, check, make_grad_outputs
from op_suite import OpSuite

import mra_kernels
from mra_kernels.testing import make_inputs


class TestNormPatchify(OpSuite):
    op = "norm_patchify"
    local_gradients = ("x",)
    # batch, height, width, channels
    shapes: ClassVar = [
        (2, 10, 8, 16),
        (3, 6, 14, 16),
        (0, 4, 5, 8),
        (1, 2, 2, 1),
        (1, 7, 7, 3),
        (2, 2, 9, 17),
        (1, 13, 2, 40),
        (1, 3, 4, 192),
        (3, 2, 3, 1),
        (1, 17, 19, 24),
    ]

    def test_odd_sides_ignore_the_last(self, route: Route) -> None:
        """An odd last row or column reaches nothing and has gradient zero, as under a stride-2 convolution."""
        inputs = self.make((2, 5, 7, 16), route, seed=20)
        whole = dict(inputs, x=inputs["x"][:, :4, :6])
        assert torch.equal(call(self.op, route.backend, inputs)[0], call(self.op, route.backend, whole)[0])
        grad = check(self.op, route, inputs, make_grad_outputs(self.op, inputs)).grads["x"]
        assert (grad[:, 4] == 0).all()
        assert (grad[:, :, 6] == 0).all()

    def test_mean_far_from_zero(self, float32_route: Route) -> None:
        inputs = self.make((2, 4, 6, 24), float32_route, seed=21)
        inputs["x"] = inputs["x"] + 1e4
        check(self.op, float32_route, inputs, make_grad_outputs(self.op, inputs))

    def test_constant_rows_give_the_bias(self, route: Route) -> None:
        inputs = self.make((2, 4, 6, 24), route, seed=22)
        inputs["x"] = torch.full_like(inputs["x"], 3.0)
        (y,) = call(self.op, route.backend, inputs)
        expected = inputs["norm_bias"].repeat(4).expand_as(y)
        assert torch.equal(y, expected) if route.is_kernel else (y - expected).abs().max() < 2e-3

    def test_eps_counts(self, route: Route) -> None:
        inputs = self.make((2, 4, 6, 24), route, seed=23, eps=0.5)
        check(self.op, route, inputs, make_grad_outputs(self.op, inputs))

    def test_a_map_without_a_patch_is_refused(self) -> None:
        inputs = make_inputs(self.op, 1, 1, 8, 4)
        with pytest.raises(ValueError, match=r"\(1, 1, 8, 4\) has no whole 2x2 patch"):
            mra_kernels.norm_patchify(*inputs.values())
