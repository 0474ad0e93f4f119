"""The cache of graphs without a GPU, whose graphs are pretended: keys, bound, invalidation, copies and failures."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from mra_model.optimization.graphs import Call, GraphCache


class FakeGraph:
    """Computes into the same memory each time, as a CUDA graph does."""

    def __init__(self, call: Call, example: Tensor) -> None:
        self.call = call
        self.inputs = torch.zeros_like(example)
        self.output = call(example)

    def replay(self) -> None:
        self.output.copy_(self.call(self.inputs))

    def turn(self) -> nullcontext:
        return nullcontext()


class FakeCapture:
    """Counts captures; refuses those of a call named `unable`."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, call: Call, example: Tensor) -> FakeGraph:
        self.count += 1
        if call is unable:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        return FakeGraph(call, example)


def double(x: Tensor) -> Tensor:
    return 2 * x


def unable(x: Tensor) -> Tensor:
    return 3 * x


@pytest.fixture
def capture() -> FakeCapture:
    return FakeCapture()


@pytest.fixture
def cache(capture: FakeCapture) -> GraphCache:
    return GraphCache(2, capture)


def run(cache: GraphCache, x: Tensor, call: Call = double, state: int = 0) -> Tensor | str:
    return cache.run(call, x, tuple(x.shape), state)


def test_captured_once_and_replayed_on_other_values(cache: GraphCache, capture: FakeCapture) -> None:
    for start in range(3):
        x = torch.arange(4.0) + start
        assert torch.equal(run(cache, x), 2 * x)
    assert capture.count == 1


def test_a_result_is_its_callers_own(cache: GraphCache) -> None:
    first = run(cache, torch.ones(3))
    run(cache, torch.zeros(3))
    assert torch.equal(first, torch.full((3,), 2.0))


def test_another_shape_has_its_own_graph(cache: GraphCache, capture: FakeCapture) -> None:
    assert run(cache, torch.ones(3)).shape == (3,)
    assert run(cache, torch.ones(5)).shape == (5,)
    assert run(cache, torch.ones(3)).shape == (3,)
    assert (capture.count, len(cache)) == (2, 2)


def test_the_least_recently_used_graph_goes(cache: GraphCache, capture: FakeCapture) -> None:
    for size in (1, 2, 1, 3):
        run(cache, torch.ones(size))
    assert cache.captured() == [(1,), (3,)]
    run(cache, torch.ones(1))
    assert capture.count == 3
    run(cache, torch.ones(2))
    assert (capture.count, len(cache)) == (4, 2)


def test_another_state_drops_every_graph(cache: GraphCache, capture: FakeCapture) -> None:
    run(cache, torch.ones(1))
    run(cache, torch.ones(2))
    run(cache, torch.ones(1), state=1)
    assert cache.captured() == [(1,)]
    assert capture.count == 3


def test_a_failure_has_a_reason_and_is_not_repeated(cache: GraphCache, capture: FakeCapture) -> None:
    for _ in range(3):
        reason = run(cache, torch.ones(1), unable)
        assert reason == "its capture failed: RuntimeError: operation not permitted when stream is capturing"
    assert (capture.count, len(cache)) == (1, 0)
    run(cache, torch.ones(1), unable, state=1)
    assert capture.count == 2


def test_clear(cache: GraphCache) -> None:
    run(cache, torch.ones(1))
    cache.clear()
    assert len(cache) == 0
