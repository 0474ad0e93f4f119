"""`python -m bench vision --model`: its steps, and its suite on a CPU with tiny models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result as Ended
from typer.testing import CliRunner

from bench import plan
from bench.__main__ import app
from bench.step import Result, Run
from bench.suites import backbones
from bench.summary import line
from mra_kernels.ops import OPS
from mra_kernels.testing import relative_error

CPU = torch.device("cpu")
MODEL = "hf:convnext_tiny"
VARIANTS = ["eager", "eager, channels last", "fused"]


def measured(function: Callable[..., None], model: str = MODEL) -> list[Result]:
    """What a suite's function records in a rehearsal."""
    found: list[Result] = []
    function(Run(CPU, True, Path(), found.append), model=model, side=224)
    return found


def run(*arguments: str) -> Ended:
    return CliRunner().invoke(app, ["vision", "--device", "cpu", *arguments])


@pytest.mark.parametrize("function", [backbones.run_forward, backbones.run_training])
def test_results(function: Callable[..., None]) -> None:
    results = measured(function)
    assert [result.variant for result in results] == VARIANTS
    for result in results:
        assert result.failure is None
        assert set(result.times) == {"call"}
        assert all(0 < error < 1e-4 for error in result.errors.values())
        assert len(result.errors) == (1 if function is backbones.run_forward else 3)
        assert (result.labels["suite"], result.labels["model"]) == ("backbones", MODEL)
        assert (result.labels["side"], result.labels["batch"], result.labels["dtype"]) == (64, 1, "float32")
    assert results[-1].facts["report"][0] == "replaced   1 x stem: patch_conv_norm"


def test_images_per_second() -> None:
    times = {"call": {"median": 250_000.0, "p20": 1.0, "p80": 1.0}}
    result = {
        "case": "a", "variant": "b", "failure": None, "times": times, "bytes": 5, "flops": 7, "errors": {},
        "labels": {"suite": "backbones", "batch": 8},
    }  # fmt: skip
    assert "32 images/s" in line(result, result)
    assert "TB/s" in line(result | {"labels": {"suite": "kernels"}}, result)


@pytest.mark.parametrize("function", [backbones.run_forward, backbones.run_training])
def test_a_planted_wrong_kernel_has_no_times(function: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["norm_patchify"]
    serve = op._serve
    monkeypatch.setattr(op, "_serve", lambda args: serve(args).flip(-1))
    *others, fused = measured(function)
    assert all(result.times for result in others)
    assert fused.failure is not None
    assert fused.failure.startswith("wrong: ")
    assert fused.is_fault


def test_a_model_that_nothing_recognises_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "build", lambda model, tiny: torch.nn.Conv2d(3, 8, 4))
    with pytest.raises(ValueError, match="nothing recognised"):
        measured(backbones.run_forward)


@pytest.mark.parametrize("name", plan.BACKBONES)
def test_the_real_sizes(name: str) -> None:
    with torch.device("meta"):
        model = backbones.build(f"hf:{name}")
    dims, depths = plan.BACKBONES[name]
    assert (model.config.hidden_sizes, model.config.depths) == (list(dims), list(depths))


def test_every_parameter_is_random() -> None:
    one, other = backbones.build(MODEL, True), backbones.build(MODEL, True)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a.std() > 0
        assert relative_error(a, b) == 0


def test_timm() -> None:
    pytest.importorskip("timm")
    results = measured(backbones.run_forward, "timm:convnext_tiny")
    assert [result.failure for result in results] == [None] * 3


class TestCommand:
    def test_it_rehearses_one_step_of_a_model(self) -> None:
        done = run("--model", MODEL, "--dry-run", "--only", "vision/*/forward/224")
        assert done.exit_code == 0, done.output
        assert "vision/hf:convnext_tiny/forward/224: done, 3 results" in done.output

    @pytest.mark.parametrize("model", ["hf:resnet", "convnext_tiny", "timm:", "hub:convnext_tiny"])
    def test_an_unknown_model_is_refused_with_those_there_are(self, model: str) -> None:
        done = run("--model", model, "--dry-run")
        assert done.exit_code == 2
        assert f"no model is called {model}; there are hf:convnext_tiny, " in done.output

    def test_every_side_and_direction_has_a_step(self) -> None:
        for model in ("hf:convnext_large", "timm:convnext_nano"):
            names = {step.name for step in plan.select("vision", "cuda", model=model)}
            directions = ("forward", "training")
            assert names == {f"vision/{model}/{d}/{side}" for d in directions for side in plan.BACKBONE_SIDES}
