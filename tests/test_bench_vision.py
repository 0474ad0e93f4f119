"""The vision benchmarks on a CPU with a tiny tower: results, labels, parts, checkpointing, refusals."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mra_kernels
from bench.step import Result, Run
from bench.suites import launches, vision
from mra_kernels.dispatch import has_kernel
from mra_kernels.ops import OPS
from mra_kernels.testing import relative_error
from mra_model.optimization import layers
from mra_model.optimization.tower import TowerRoute

CPU = torch.device("cpu")
RUN = Run(CPU, True, Path(), lambda result: None)
PARTS = {"stem", "stage 1", "stage 2", "stage 3", "stage 4", "ViT", "adapters", "merge"}


def measured(function: Callable[..., None], **arguments: object) -> list[Result]:
    """What a suite's function records in a rehearsal; no two results have the same labels and variant."""
    found: list[Result] = []
    function(Run(CPU, True, Path(), found.append), **arguments)
    keys = Counter((*sorted(result.labels.items()), result.variant) for result in found)
    assert set(keys.values()) == {1}
    assert {result.labels["suite"] for result in found} == {"vision"}
    assert all(result.labels["side"] == 128 and result.labels["dtype"] == "bfloat16" for result in found)
    return found


@pytest.mark.parametrize("batch", [1, 3])
def test_forward(batch: int) -> None:
    results = measured(vision.run_forward, batch=batch)
    assert [result.variant for result in results] == ["eager", "fused", "optimized"]
    for result in results:
        assert result.failure is None
        # Parts are timed by hooks, with which the optimized tower would compute otherwise.
        assert set(result.parts) == (set() if result.variant == "optimized" else PARTS)
        assert all(time > 0 for time in result.parts.values())
        assert 0 < result.errors["features"] < 0.05
        assert set(result.times) == {"call"}
        assert result.launches
        assert (result.labels["direction"], result.labels["batch"]) == ("forward", batch)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(checkpointing: bool) -> None:
    results = measured(vision.run_training, batch=2, checkpointing=checkpointing)
    assert [result.variant for result in results] == ["eager", "fused"]
    for result in results:
        assert result.failure is None
        assert set(result.parts) == {"forward", "backward"}
        assert result.labels["checkpointing"] is checkpointing
        assert result.labels["direction"] == "training"
        assert len(result.errors) == len(vision.CHECKED)
        assert result.facts == {"exact": "float32"}


def test_compiled() -> None:
    results = measured(vision.run_compiled, batch=1, mode="max-autotune")
    assert [result.variant for result in results] == ["eager", "fused", "optimized", "torch.compile"]
    assert all(result.failure is None for result in results)
    assert all(result.labels["compiled"] and result.labels["mode"] == "max-autotune" for result in results)
    assert set(results[0].parts) == PARTS


@pytest.mark.parametrize("side", ["eager", "fused"])
def test_checkpointing_computes_again_and_gives_equal_gradients(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = vision._make(RUN, 2)
    tower = subject.tower.train().float()
    grad = torch.randn_like(vision._forward(tower, subject.pixels, "eager"))
    calls: list[int] = []
    # A hook would not do: transformers keeps hooks outside of what is computed again.
    convolution = OPS["depthwise_conv_norm"]
    serve = convolution._serve
    monkeypatch.setattr(convolution, "_serve", lambda args: (calls.append(1), serve(args))[1])

    def gradients() -> list[Tensor]:
        calls.clear()
        return vision._train(tower, subject.pixels, grad, side)

    plain, once = gradients(), len(calls)
    tower.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert len(calls) == 2 * once
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(checkpointed, plain, strict=True))
    assert all(parameter.grad is None for parameter in tower.parameters())


def test_only_the_optimized_variant_takes_the_route() -> None:
    subject = vision._make(RUN, 1)
    variants = vision._variants(subject)
    assert subject.tower.route is None
    tower = variants["optimized"].args[0]
    assert tower is not subject.tower
    variants["optimized"]()
    report = tower.route.report
    assert (report.ungraphed.total(), report.plain.total()) == (1, 0)


class TestLaunches:
    def test_counts_what_computes(self) -> None:
        x, weight, bias = torch.randn(2, 6, 8), torch.randn(8, 8), torch.randn(8)

        def call() -> None:
            y = F.linear(x, weight, bias).transpose(0, 1)
            torch.empty_like(y).copy_(y)
            y.contiguous().view(-1).split(3)
            mra_kernels.linear_gelu(x, weight, bias)

        found = launches.count_launches(call)
        assert found == {"aten::addmm": 1, "aten::copy_": 1, "aten::clone": 1, "mra::linear_gelu": 1}

    def test_the_tower(self) -> None:
        """Each route takes fewer launches than the one before, and what it fuses is gone."""
        found: list[Result] = []
        launches.run(Run(CPU, True, Path(), found.append))
        assert [result.variant for result in found] == ["eager", "fused", "optimized"]
        assert [result.failure for result in found] == [None] * 3
        eager, fused, optimized = (result.launches for result in found)
        assert eager > fused > optimized > 0
        assert all(result.launches == sum(result.facts["operators"].values()) for result in found)
        operators = [result.facts["operators"] for result in found]
        assert [of.get("mra::depthwise_conv_norm", 0) for of in operators] == [0, 36, 36]
        # Two projections fewer a layer, one kernel for quick-GELU's two and one for sum and norm; two of the adapters'
        # first 1x1 less. The last layer of each of the four quarters has no norm behind its sum.
        assert [of.get("mra::add_norm", 0) for of in operators] == [0, 0, 2 * 24 - 4]
        assert fused - optimized >= 24 * (2 + 1) + (2 * 24 - 4) + 2

    def test_the_routes_of_a_gpu_end_with_the_call(self) -> None:
        with launches.routes_of_a_gpu():
            assert has_kernel("add_norm", torch.device("cpu"), torch.float32)
            assert not layers.on_cpu(torch.zeros(1))
        assert not has_kernel("add_norm", torch.device("cpu"), torch.float64)
        assert layers.on_cpu(torch.zeros(1))

    def test_a_planted_wrong_route_has_no_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TowerRoute, "__call__", lambda route, pixels, grid: torch.zeros(1, 25, 32))
        found: list[Result] = []
        launches.run(Run(CPU, True, Path(), found.append))
        assert [result.launches is None for result in found] == [False, False, True]
        assert "wrong" in found[-1].failure
        assert found[-1].is_fault


def test_parts_cover_each_module_once() -> None:
    """Every parameter of the tower belongs to one part, but for the position embedding, which is no module."""
    subject = vision._make(RUN, 1)
    owners = Counter(
        parameter for modules in subject.parts.values() for module in modules for parameter in module.parameters()
    )
    assert set(owners.values()) == {1}
    missing = {name for name, parameter in subject.tower.named_parameters() if parameter not in owners}
    assert missing == {"low.position_embedding"}


def test_float64_is_eager_s() -> None:
    """With the affordable convolution or without it, and the op is left as it was."""
    subject = vision._make(RUN, 2)
    before = OPS["depthwise_conv_norm"].reference
    ours = vision._forward_exactly(subject, [0, 1])
    assert OPS["depthwise_conv_norm"].reference is before
    tower = subject.tower.double()
    theirs = vision._forward(tower, subject.pixels.double(), "eager")
    assert relative_error(ours, theirs) < 1e-12
    assert not torch.equal(theirs[0], theirs[1])


@pytest.mark.parametrize("function", [vision.run_forward, vision.run_training])
def test_a_planted_wrong_tower_has_no_times(function: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused side computes with a stem whose channels are in the wrong order: it is refused, eager is timed."""
    choose, stem = vision.use_backend, OPS["patch_conv_norm"]
    right = stem._serve

    def wrong(args: tuple) -> Tensor:
        y = right(args)
        return y if vision_backend[-1] == "reference" else y.flip(-1)

    vision_backend: list[str] = ["reference"]

    def noted(name: str) -> object:
        vision_backend.append(name)
        return choose(name)

    monkeypatch.setattr(vision, "use_backend", noted)
    monkeypatch.setattr(stem, "_serve", wrong)
    results = {
        result.variant: result
        for result in measured(
            function, batch=1, **({"checkpointing": False} if function is vision.run_training else {})
        )
    }
    assert results["eager"].times
    assert results["fused"].failure is not None
    assert "wrong" in results["fused"].failure
    assert not results["fused"].times
    assert not results["fused"].parts
