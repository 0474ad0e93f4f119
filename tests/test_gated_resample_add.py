"""`gated_resample_add`: what every op must do, its three modes, and which positions read which."""

from typing import ClassVar

import pytest
import torch
from op_calls import Bound, Route, call, check, make_grad_outputs, solve_exactly
from op_suite import OpSuite
from torch import Tensor

import mra_kernels
from mra_kernels.testing import make_inputs, relative_error


class TestGatedResampleAdd(OpSuite):
    op = "gated_resample_add"
    local_gradients = ("low",)
    # batch, height, width, height and width of the high-resolution map, channels
    shapes: ClassVar = [
        (2, 9, 8, 5, 3, 16),
        (3, 11, 7, 6, 4, 16),
        (2, 5, 4, 5, 4, 16),
        (2, 3, 4, 6, 12, 16),
        (0, 4, 5, 2, 3, 8),
        (0, 4, 5, 4, 5, 8),
        (0, 2, 3, 4, 3, 8),
        (1, 1, 1, 1, 1, 1),
        (1, 1, 1, 5, 7, 3),
        (2, 7, 7, 1, 1, 3),
        (2, 1, 9, 1, 4, 17),
        (1, 4, 6, 4, 3, 40),
        (1, 2, 7, 2, 14, 192),
        (3, 2, 1, 4, 1, 1),
        (1, 24, 24, 12, 12, 24),
    ]

    def assert_nan_where(self, actual: Tensor, expected: Tensor) -> None:
        """Where a position lies on a node its neighbour has weight zero: reading it or not is rounding's choice."""
        if actual.shape[1:3] != (9, 8):
            super().assert_nan_where(actual, expected)
            return
        assert actual.isnan().any()
        assert not (actual.isnan() & ~expected.isnan()).any() or self._on_nodes(actual.isnan() ^ expected.isnan())

    @staticmethod
    def _on_nodes(differ: Tensor) -> bool:
        """9 rows over 5 nodes: every even row is a node; 8 columns over 3: only the ends are."""
        rows, columns = differ.any(0).any(-1).nonzero(as_tuple=True)
        return all(r % 2 == 0 or c in (0, 7) for r, c in zip(rows.tolist(), columns.tolist(), strict=True))

    @pytest.mark.parametrize("grids", [(2, 5, 4, 5, 4, 16), (2, 3, 4, 6, 12, 16)], ids=str)
    def test_nan_in_high_stays_local(self, grids: tuple, route: Route) -> None:
        """Same grid and pooling: exactly the element, or the window, that reads it; and back, what it was read from."""
        inputs = self.make(grids, route, seed=20)
        inputs["high"][0, 2, 1, 3] = float("nan")
        (first,) = make_grad_outputs(self.op, inputs)
        exact = solve_exactly(self.op, inputs, (first,), ["high"])
        (actual,) = call(self.op, route.backend, inputs)
        assert exact.outputs[0].isnan().sum() == 1
        assert torch.equal(actual.isnan(), exact.outputs[0].isnan())

    def test_gate_zero_leaves_the_low_map(self, route: Route) -> None:
        for dims in self.shapes[:4]:
            inputs = self.make(dims, route, seed=21)
            inputs["gate"] = torch.zeros_like(inputs["gate"])
            assert torch.equal(call(self.op, route.backend, inputs)[0], inputs["low"])

    def test_corners_are_aligned(self, route: Route) -> None:
        """The corners of the resized map are those of its source, bitwise."""
        inputs = self.make((1, 7, 9, 3, 4, 8), route, seed=22)
        inputs["low"], inputs["gate"] = torch.zeros_like(inputs["low"]), torch.ones_like(inputs["gate"])
        (y,) = call(self.op, route.backend, inputs)
        for row in (0, -1):
            for column in (0, -1):
                torch.testing.assert_close(y[:, row, column], inputs["high"][:, row, column])

    def test_mean_far_from_zero(self, float32_route: Route) -> None:
        for dims in self.shapes[:4]:
            inputs = self.make(dims, float32_route, seed=23)
            inputs["high"] = inputs["high"] + 1e4
            check(self.op, float32_route, inputs, make_grad_outputs(self.op, inputs))

    @pytest.mark.parametrize("grids", [(2, 5, 4, 5, 4, 16), (2, 3, 4, 6, 12, 16)], ids=str)
    def test_compile_other_modes(self, grids: tuple) -> None:
        """The same grid and pooling under a compiler; the shared test compiles the resize."""
        torch._dynamo.reset()
        inputs = make_inputs(self.op, *grids)
        module = Bound(self.op, "auto", inputs)
        data = [inputs[n].requires_grad_() for n in ("low", "high", "gate")]
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        for a, e in zip(self._run(compiled, module, data), self._run(module, module, data), strict=True):
            assert relative_error(a, e) < 1e-5

    @pytest.mark.parametrize("high", [(7, 6), (5, 2), (2, 8), (4, 6)])
    def test_grids_that_do_not_divide_are_refused(self, high: tuple[int, int]) -> None:
        """Larger on one axis and smaller on the other, or no multiple: no whole windows."""
        inputs = make_inputs(self.op, 1, 3, 4, *high, 8)
        with pytest.raises(ValueError, match=rf"grid of \({high[0]}, {high[1]}\) cannot be pooled to \(3, 4\)"):
            mra_kernels.gated_resample_add(*inputs.values())

    def test_other_batch_or_channels_are_refused(self) -> None:
        inputs = make_inputs(self.op, 2, 3, 4, 3, 4, 8)
        for wrong in ((1, 3, 4, 8), (2, 3, 4, 7)):
            with pytest.raises(ValueError, match="high has shape"):
                mra_kernels.gated_resample_add(inputs["low"], torch.zeros(wrong), inputs["gate"])
