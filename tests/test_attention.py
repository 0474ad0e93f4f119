"""`attention`: what every op must do, blocks of queries and keys, scores far apart, and rows of one product."""

import math
from functools import partial
from typing import ClassVar

import pytest
import torch
from op_calls import Route, call, check, make_grad_outputs, solve, threads
from op_suite import OpSuite
from torch.nn.attention import SDPBackend, sdpa_kernel

import mra_kernels
from mra_kernels.native import attention as native
from mra_kernels.testing import make_inputs, relative_error


class TestAttention(OpSuite):
    op = "attention"
    local_gradients = ("query", "key", "value")
    # pictures, queries, keys, heads, channels
    shapes: ClassVar = [
        (2, 9, 7, 3, 16),
        (3, 5, 11, 4, 16),
        (0, 4, 4, 2, 8),
        (2, 0, 4, 2, 8),
        (1, 1, 1, 1, 1),
        (1, 2, 3, 1, 3),
        (1, 33, 16, 1, 17),
        (1, 34, 65, 2, 64),
        (1, 31, 64, 1, 80),
        (1, 64, 48, 1, 130),
        (1, 3, 513, 1, 33),
        (1, 70, 1040, 1, 8),
    ]

    def test_nan_stays_local(self, argument: str, route: Route) -> None:
        self.skip_without_nan(route)
        super().test_nan_stays_local(argument, route)

    def test_infinity_stays_local(self, route: Route) -> None:
        self.skip_without_nan(route)
        super().test_infinity_stays_local(route)

    def skip_without_nan(self, route: Route) -> None:
        if not route.is_kernel:
            pytest.skip("the library's softmax makes zeros of scores that are NaN")

    def test_second_derivative_is_refused(self) -> None:
        with sdpa_kernel(SDPBackend.MATH):  # the only one of the library that has a second derivative
            super().test_second_derivative_is_refused()

    @pytest.mark.parametrize("scale", [0.0, 0.3, -0.7, 2.5])
    def test_scale(self, route: Route, scale: float) -> None:
        inputs = self.make((2, 9, 70, 2, 16), route, seed=20) | {"scale": scale}
        check(self.op, route, inputs, make_grad_outputs(self.op, inputs))

    def test_larger_scores_in_every_block(self, route: Route) -> None:
        """What was summed before fades to nothing; in the other order, what comes later has no weight."""
        for sign in (1, -1):
            inputs = self.make((1, 6, 1100, 1, 16), route, seed=21)
            ramp = torch.linspace(-20 * sign, 20 * sign, 1100, device=route.device)[None, :, None, None]
            inputs["key"] = (inputs["key"] + ramp).to(route.dtype)
            inputs["query"] = inputs["query"].abs()
            check(self.op, route, inputs, make_grad_outputs(self.op, inputs))

    def test_equal_scores_give_the_mean(self, float32_route: Route) -> None:
        inputs = self.make((2, 9, 70, 2, 16), float32_route, seed=22)
        inputs["key"] = torch.zeros_like(inputs["key"])
        (y,) = call(self.op, float32_route.backend, inputs)
        torch.testing.assert_close(y, inputs["value"].mean(1, keepdim=True).expand_as(y))

    def test_rows_of_one_product(self, route: Route) -> None:
        """Query, key and value as views of [B, L, 3, H, D] give what copies of them give."""
        *tensors, scale = self.make((2, 37, 37, 2, 24), route, seed=23).values()
        query, key, value = torch.stack(tensors, dim=2).unbind(2)
        views = {"query": query, "key": key, "value": value, "scale": scale}
        copies = {name: view if view is None else view.contiguous() for name, view in views.items()}
        assert torch.equal(*(call(self.op, route.backend, inputs)[0] for inputs in (views, copies)))
        check(self.op, route, views, make_grad_outputs(self.op, views))

    def test_rows_of_one_product_are_not_copied(self) -> None:
        for view in torch.randn(2, 5, 3, 4, 8).unbind(2):
            assert native._in_rows(view) is view

    def test_logsumexp(self) -> None:
        """What backward reads, and who takes heads of several pieces would."""
        inputs = make_inputs(self.op, 2, 9, 600, 2, 16, seed=24)
        _, logsumexp = native.forward(*inputs.values())
        scores = torch.einsum("blhd,bmhd->bhlm", inputs["query"].double(), inputs["key"].double()) / math.sqrt(16)
        assert relative_error(logsumexp, scores.logsumexp(-1)) < 1e-6

    def test_a_nan_stays_in_its_row(self, kernel: Route) -> None:
        inputs = self.make((2, 35, 70, 2, 16), kernel, seed=25)
        inputs["query"][1, 34, 1, 3] = math.nan
        (y,) = call(self.op, kernel.backend, inputs)
        assert y[1, 34, 1].isnan().all()
        y[1, 34, 1] = 0
        assert y.isfinite().all()

    def test_what_a_call_leaves_in_memory_reaches_no_other(self, kernel: Route) -> None:
        """Threads keep their memory, full of NaN here; one query fills little of it, and half of its pair."""
        with threads(1):
            for name in ("query", "key", "value"):
                inputs = self.make((1, 64, 70, 1, 20), kernel, seed=27)
                inputs[name] = torch.full_like(inputs[name], math.nan)
                solve(partial(call, self.op, kernel.backend), inputs, make_grad_outputs(self.op, inputs), [name])
                inputs = self.make((1, 1, 70, 1, 20), kernel, seed=28)
                check(self.op, kernel, inputs, make_grad_outputs(self.op, inputs))

    def test_infinite_scores_have_no_weight(self, kernel: Route) -> None:
        """A key at minus infinity is one that is masked."""
        inputs = self.make((1, 3, 600, 1, 4), kernel, seed=26)
        inputs["query"] = inputs["query"].abs() + 0.1
        inputs["key"][:, :520] = -math.inf
        (y,) = call(self.op, kernel.backend, inputs)
        rest = inputs | {"key": inputs["key"][:, 520:], "value": inputs["value"][:, 520:]}
        torch.testing.assert_close(y, call(self.op, kernel.backend, rest)[0])

    def test_refusals(self) -> None:
        inputs = make_inputs(self.op, 1, 3, 4, 2, 8)
        query, key, value, _ = inputs.values()
        with pytest.raises(ValueError, match=r"value has shape \(1, 3, 2, 8\), but must be \(1, 4, 2, 8\)"):
            mra_kernels.attention(query, key, value[:, :3])
        with pytest.raises(ValueError, match=r"key of \(1, 0, 2, 8\) has no rows to attend to"):
            mra_kernels.attention(query, key[:, :0], value[:, :0])
        with pytest.raises(ValueError, match=r"query must be \[B, rows, H, D\], but has shape \(3, 2, 8\)"):
            mra_kernels.attention(query[0], key, value)
