"""`patch_conv_norm`: what every op must do, pictures that are no multiple of a patch, and its LayerNorm's edges."""

from typing import ClassVar

import pytest
import torch
from op_calls import Route, call, check, make_grad_outputs
from op_suite import OpSuite

import mra_kernels
from mra_kernels.testing import make_inputs


class TestPatchConvNorm(OpSuite):
    op = "patch_conv_norm"
    local_gradients = ("pixels",)
    inductor_trains = False
    # batch, planes, height, width, channels, patch
    shapes: ClassVar = [
        (2, 3, 20, 28, 16, 4),
        (4, 3, 12, 24, 16, 4),
        (0, 3, 8, 8, 8, 4),
        (1, 1, 1, 1, 1, 1),
        (1, 3, 7, 7, 3, 7),
        (2, 3, 9, 11, 17, 2),
        (1, 3, 13, 6, 40, 4),
        (1, 4, 8, 12, 192, 4),
        (3, 1, 4, 5, 1, 4),
        (1, 3, 28, 32, 24, 4),
    ]

    def test_rows_past_the_last_patch_are_ignored(self, route: Route) -> None:
        inputs = self.make((2, 3, 11, 14, 16, 4), route, seed=20)
        whole = dict(inputs, pixels=inputs["pixels"][:, :, :8, :12])
        for a, e in zip(call(self.op, route.backend, inputs), call(self.op, route.backend, whole), strict=True):
            torch.testing.assert_close(a, e)
        grad = check(self.op, route, inputs, make_grad_outputs(self.op, inputs)).grads["pixels"]
        assert (grad[:, :, 8:] == 0).all()
        assert (grad[..., 12:] == 0).all()

    def test_mean_far_from_zero(self, float32_route: Route) -> None:
        inputs = self.make((2, 3, 8, 12, 24, 4), float32_route, seed=21)
        inputs["bias"] = inputs["bias"] + 1e4
        check(self.op, float32_route, inputs, make_grad_outputs(self.op, inputs))

    def test_constant_channels_give_the_bias(self, route: Route) -> None:
        inputs = self.make((2, 3, 8, 12, 24, 4), route, seed=22)
        inputs["weight"] = torch.zeros_like(inputs["weight"])
        inputs["bias"] = torch.full_like(inputs["bias"], 3.0)
        (y,) = call(self.op, route.backend, inputs)
        expected = inputs["norm_bias"].expand_as(y)
        assert torch.equal(y, expected) if route.is_kernel else (y - expected).abs().max() < 2e-3

    def test_eps_counts(self, route: Route) -> None:
        inputs = self.make((2, 3, 8, 12, 24, 4), route, seed=23, eps=0.5)
        check(self.op, route, inputs, make_grad_outputs(self.op, inputs))

    def test_a_picture_smaller_than_a_patch_is_refused(self) -> None:
        inputs = make_inputs(self.op, 1, 3, 3, 8, 4, 4)
        with pytest.raises(ValueError, match=r"a picture of \(3, 8\) is smaller than a patch of 4"):
            mra_kernels.patch_conv_norm(*inputs.values())
