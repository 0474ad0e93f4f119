"""Graphs without a GPU, where they are pretended: the cache alone, and the tower's keys, bound and invalidation."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from conftest import make_tiny_config
from test_optimize import look, pictures, plainly
from torch import Tensor, nn

import mra_kernels
from mra_kernels.modules import Merge
from mra_kernels.testing import relative_error
from mra_model import MraVisionModel, build_model, optimize
from mra_model.modeling_mra import MraAdapterLayer, MraConvNeXt
from mra_model.optimization import tower as route_module
from mra_model.optimization.graphs import Call, GraphCache
from mra_model.optimization.layers import LayerRoute


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


class PretendedCapture:
    """In place of `CudaCapture`: graphs that insist on the memory they were captured with."""

    side = None
    tower: MraVisionModel
    count = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, call: Any, example: Tensor) -> FakeGraph:
        type(self).count += 1
        captured = [p.data_ptr() for p in self.tower.parameters()]

        def checked(inputs: Tensor) -> Tensor:
            assert [p.data_ptr() for p in self.tower.parameters()] == captured, "replayed with weights that moved"
            return call(inputs)

        return FakeGraph(checked, example)


class TestTower:
    @pytest.fixture
    def capture(self, tower: MraVisionModel, monkeypatch: pytest.MonkeyPatch) -> type[PretendedCapture]:
        capture = type("Capture", (PretendedCapture,), {"tower": tower, "count": 0})
        monkeypatch.setattr(route_module, "GRAPH_DEVICES", ("cpu",))
        monkeypatch.setattr(route_module, "CudaCapture", capture)
        return capture

    def test_features_stay(self, tower: MraVisionModel, capture: type[PretendedCapture]) -> None:
        optimize(tower)
        first = look(tower, pictures(1, seed=0))
        kept = first.clone()
        second = look(tower, pictures(1, seed=1))
        assert capture.count == 1
        assert torch.equal(first, kept)
        assert relative_error(second, plainly(tower, pictures(1, seed=1))) < 1e-5

    def test_one_for_each_batch_side_and_dtype(self, tower: MraVisionModel, capture: type[PretendedCapture]) -> None:
        report = optimize(tower, max_graphs=4)
        bytes_ = (255 * torch.rand(1, 3, 160, 160)).to(torch.uint8)
        every = [pictures(1), pictures(2), pictures(1, 128), bytes_]
        for pixels in every + every:
            assert relative_error(look(tower, pixels), plainly(tower, pixels)) < 1e-5
        assert capture.count == 4
        assert not report.ungraphed
        assert report.graphs[-1] == "B=1, 160 x 160, uint8"
        look(tower, pictures(3))
        assert len(report.graphs) == 4
        assert "B=1, 160 x 160, float32" not in report.graphs

    @pytest.mark.parametrize("change", ["load", "assign", "dtype", "positions", "module"])
    def test_no_stale_graph(self, tower: MraVisionModel, capture: type[PretendedCapture], change: str) -> None:
        optimize(tower)
        before = look(tower, pictures(1))
        state = build_model(make_tiny_config(), seed=5).model.vision_tower.state_dict()
        if change in ("load", "assign"):
            tower.load_state_dict(state, assign=change == "assign")
        elif change == "dtype":
            tower.double()
        elif change == "positions":
            with torch.no_grad():
                tower.low.position_embedding.mul_(2)
        else:
            tower.low.layers[3].mlp.fc2 = copy.deepcopy(tower.low.layers[3].mlp.fc2)
            nn.init.normal_(tower.low.layers[3].mlp.fc2.weight)
        after = look(tower, pictures(1))
        assert relative_error(after, plainly(tower, pictures(1))) < 1e-5
        assert relative_error(after, before) > (0 if change == "dtype" else 1e-4)

    def test_backend_and_train(self, tower: MraVisionModel, capture: type[PretendedCapture]) -> None:
        report = optimize(tower)
        look(tower, pictures(1))
        with mra_kernels.use_backend("native,reference"):
            look(tower, pictures(1))
        assert capture.count == 2
        tower.train()
        look(tower, pictures(1))
        assert len(tower.route._graphs) == 0
        look(tower.eval(), pictures(1))
        assert capture.count == 3
        assert list(report.plain) == ["the tower is in training mode"]

    def test_hooks_keep_out_of_graphs(self, tower: MraVisionModel, capture: type[PretendedCapture]) -> None:
        report = optimize(tower)
        calls = []
        tower.high.stem.register_forward_hook(lambda *_: calls.append(1))
        look(tower, pictures(1))
        assert (calls, capture.count) == ([1], 0)
        assert "high.stem has hooks" in next(iter(report.ungraphed))


class FakeStream:
    """Writes down who waits for whom."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize("adapters", [True, False])
def test_two_streams(adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """ConvNeXt starts once the pixels are there, and whatever reads its map on the main stream waits for it."""
    log: list[str] = []
    current = [FakeStream("main", log)]

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def logged(name: str, forward: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            log.append(f"{name} on {current[-1].name}")
            return forward(*args, **kwargs)

        return call

    capture = type("Capture", (PretendedCapture,), {"side": FakeStream("side", log)})
    monkeypatch.setattr(route_module, "GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(route_module, "CudaCapture", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    tower = build_model(make_tiny_config(adapters=adapters)).model.vision_tower
    capture.tower = tower
    optimize(tower)
    names = {MraConvNeXt: "ConvNeXt", MraAdapterLayer: "adapter", Merge: "merge"}
    with monkeypatch.context() as patch:
        patch.setattr(LayerRoute, "between", logged("layer", LayerRoute.between))
        for module, name in names.items():
            patch.setattr(module, "forward", logged(name, module.forward))
        found = look(tower, pictures(1))
    once = log[: len(log) // 2]
    layers = ["layer on main", "adapter on main"] if adapters else ["layer on main"]
    assert (
        once
        == log[len(log) // 2 :]
        == [
            "side waits for main",
            "ConvNeXt on side",
            "layer on main",
            "main waits for side",
            *layers[1:],
            *layers * 2,
            "layer on main",
            "merge on main",
        ]
    )
    assert relative_error(found, plainly(tower, pictures(1))) < 1e-5
