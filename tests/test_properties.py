"""Random shapes, layouts and dtypes of every op against float64.

100 examples an op, the same ones on every run; `PROPERTY_EXAMPLES=1000` runs more.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_calls import BACKENDS, DTYPES, Route, check, lay_out, make_grad_outputs, threads
from torch import Tensor

from mra_kernels.dispatch import why_not
from mra_kernels.modules import resample_mean_weights
from mra_kernels.ops import OPS
from mra_kernels.reference.gated_resample_add import resample
from mra_kernels.testing import LAYOUTS, make_inputs

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "100"))
PROFILE = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


batches = st.integers(0, 3)
sides = st.integers(1, 12)
channels = st.integers(1, 40) | st.sampled_from([64, 100, 192])
# A LayerNorm over two channels gives +-1, whose gradient is zero but for eps: the library's is rounding alone.
normed = channels.filter(lambda c: c != 2)
leads = st.lists(st.integers(0, 6), min_size=1, max_size=3).map(tuple)


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """A low-resolution grid, and a high-resolution one that can be brought to it."""
    height, width = draw(sides), draw(sides)
    if draw(st.booleans()):
        return height, width, draw(st.integers(1, height)), draw(st.integers(1, width))
    return height, width, height * draw(st.integers(1, 3)), width * draw(st.integers(1, 3))


@st.composite
def pictures(draw: st.DrawFn) -> tuple[int, ...]:
    patch = draw(st.integers(1, 5))
    side = st.integers(patch, 20)
    return draw(batches), draw(st.integers(1, 4)), draw(side), draw(side), draw(normed), patch


depthwise = st.tuples(batches, sides, sides, channels)
DIMS: dict[str, st.SearchStrategy[tuple]] = {
    "adapter_gate": st.tuples(batches, channels, channels),
    "add_norm": st.tuples(leads, normed),
    "attention": st.tuples(batches, st.integers(0, 40), st.integers(1, 90), st.integers(1, 3), st.integers(1, 70)),
    "depthwise_conv_gelu": depthwise,
    "depthwise_conv_norm": st.tuples(batches, sides, sides, normed),
    "gated_projection_add": st.tuples(leads, channels, channels, channels),
    "gated_resample_add": st.tuples(batches, grids(), channels).map(lambda d: (d[0], *d[1], d[2])),
    "linear_gelu": st.tuples(leads.filter(lambda lead: len(lead) > 1), channels, channels, st.booleans()),
    "linear_scale_residual": st.tuples(leads, channels, channels, st.booleans()),
    "norm_patchify": st.tuples(batches, st.integers(2, 12), st.integers(2, 12), normed),
    "patch_conv_norm": pictures(),
    "project_mean": st.tuples(batches, channels, channels, st.booleans()),
}


@pytest.mark.parametrize("op", OPS)
@PROFILE
@given(data=st.data())
def test_values_and_gradients(op: str, data: st.DataObject) -> None:
    """The tolerance rule, for every backend that serves the drawn dtype."""
    dims = data.draw(DIMS[op], label="dims")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)), label="layout")
    seed = data.draw(st.integers(0, 1000), label="seed")
    inputs = lay_out(make_inputs(op, *dims, dtype=dtype, seed=seed), layout)
    grad_outputs = make_grad_outputs(op, inputs, seed=seed + 1, layout=layout)
    for backend in BACKENDS:
        route = Route("cpu", backend, dtype)
        if why_not(OPS[op].backends, route.schema_backend, torch.device("cpu"), dtype) is None:
            check(op, route, inputs, grad_outputs)


@PROFILE
@given(grid=grids(), seed=st.integers(0, 1000))
def test_mean_weights(grid: tuple[int, int, int, int], seed: int) -> None:
    """The mean of a resampled map is the weighted mean of its source, and a mean of ones is one."""
    height, width, *source = grid
    x = torch.randn(1, *source, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weights = resample_mean_weights(source, (height, width), x.new_empty(0))
    actual: Tensor = (x.flatten(1, 2) * weights[:, None]).sum(1)
    torch.testing.assert_close(actual, resample(x, height, width).mean((1, 2)))
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))


def test_every_op_is_drawn() -> None:
    missing: Any = set(OPS) ^ set(DIMS)
    assert not missing
