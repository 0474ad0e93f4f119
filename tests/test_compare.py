"""`mra compare`: that it measures what it says, and that a wrong fused kernel cannot pass."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_config
from torch import Tensor, nn
from transformers import GenerationConfig, LlavaForConditionalGeneration
from typer.testing import CliRunner

import mra_kernels
from mra_kernels.dispatch import Backend, is_reference
from mra_kernels.ops import OPS
from mra_model import build_model, build_processor, load_tokenizer
from mra_model import compare as comparing
from mra_model.cli import app
from mra_model.compare import (
    EAGER,
    FUSED,
    NEW_TOKENS,
    Comparison,
    Options,
    measure,
    prepare,
    result,
    subject,
)
from mra_model.compare.measure import Way
from mra_model.compare.peak import Peak, measure_peak
from mra_model.optimization import layers

UNMEASURED = Peak(None, None, "not in this test")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights and no tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    build_model(make_tiny_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def options(model_dir: Path) -> Options:
    return Options(model=str(model_dir), dtype="float32", device="cpu")


@pytest.fixture
def no_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the two processes that measure memory out: each imports everything again."""
    monkeypatch.setattr(comparing, "measure_peak", lambda options, way: UNMEASURED)


def compared(options: Options, runs: int | None = 1, stage: Callable[[str], None] = lambda name: None) -> Comparison:
    return comparing.compare(options, prepare(options), runs, stage)


def an_answer(model: LlavaForConditionalGeneration, inputs: dict[str, Tensor], count: int) -> measure.Run:
    with mra_kernels.use_backend("reference"):
        return measure.answer(model, inputs, count, measure.parts_of(model))


def plant(monkeypatch: pytest.MonkeyPatch, op: str, factor: float) -> None:
    """Gives `op` a native kernel whose result is the reference's times `factor`."""
    operator = OPS[op]

    def forward(*inputs: object) -> object:
        outputs = operator._run_forward(*inputs, "reference")
        return outputs * factor if isinstance(outputs, Tensor) else (outputs[0] * factor, *outputs[1:])

    kernel = Backend(forward, forward, lambda device, dtype: None)
    monkeypatch.setitem(operator.backends, "native", kernel)


# The command.


def test_command_prints_a_table_and_writes_everything(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    arguments = ["compare", "--model", model_dir, "--dtype", "fp32", "--device", "cpu", "--runs", 2, "--json", file]
    ended = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})
    assert ended.exit_code == 0, ended.output
    for part in ("stem", "stage 4", "ViT", "adapters", "merge", "projector", "language model", "peak memory"):
        assert part in ended.stdout
    assert f"all {NEW_TOKENS} are equal" in ended.stdout
    assert ended.stdout.strip().splitlines()[-1].startswith("OK: fused agrees with eager and is")
    content = json.loads(file.read_text())
    assert content["verdict"].startswith("OK")
    assert content["agreement"]["features"] < 1e-5
    assert content["subject"]["side"] == 128
    assert content["versions"]["torch"] == torch.__version__
    assert content["hardware"]["cpu"]["threads"] == torch.get_num_threads()
    assert set(content["backends"][EAGER].values()) == {"reference"}
    for side in (EAGER, FUSED):
        assert [len(sample["tokens"]) for sample in content["samples"][side]] == [NEW_TOKENS, NEW_TOKENS]
        memory = content["peak_memory"][side]
        weights = sum(p.numel() * p.element_size() for p in build_model(make_tiny_config()).parameters())
        assert memory["problem"] is None
        assert memory["weights"] == weights
        # Libraries alone take more than 100 MiB; a tiny model needs nowhere near 4 GiB.
        assert 100 * 2**20 < memory["peak"] < 4 * 2**30


@pytest.mark.usefixtures("no_peaks")
@pytest.mark.parametrize("op", ["depthwise_conv_norm", "linear_gelu", "linear_scale_residual", "gated_projection_add"])
def test_a_wrong_fused_kernel_fails(monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path, op: str) -> None:
    plant(monkeypatch, op, 1.05)
    file = tmp_path / "result.json"
    arguments = ["compare", "--model", str(model_dir), "--dtype", "fp32", "--device", "cpu", "--runs", "1"]
    ended = CliRunner().invoke(app, [*arguments, "--json", str(file)])
    assert ended.exit_code == 1, ended.output
    assert "FAILED: vision features differ" in ended.stdout
    assert "Traceback" not in ended.output
    content = json.loads(file.read_text())
    assert content["agreement"]["features"] > 1e-3
    assert content["backends"][FUSED][op] == "native"


@pytest.mark.usefixtures("no_peaks")
def test_a_fused_kernel_that_gives_nan_fails(monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path) -> None:
    plant(monkeypatch, "depthwise_conv_norm", float("nan"))
    file = tmp_path / "result.json"
    arguments = ["compare", "--model", str(model_dir), "--dtype", "bf16", "--device", "cpu", "--runs", "1"]
    assert CliRunner().invoke(app, [*arguments, "--json", str(file)]).exit_code == 1
    assert json.loads(file.read_text())["agreement"]["features"] == "nan"


@pytest.mark.usefixtures("no_peaks")
def test_an_interrupt_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "answer", interrupt)
    file = tmp_path / "result.json"
    arguments = ["compare", "--model", str(model_dir), "--device", "cpu", "--json", str(file)]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 130
    assert "interrupted" in ended.stderr
    assert "Traceback" not in ended.output
    assert not list(tmp_path.iterdir())


# How it measures.


@pytest.mark.usefixtures("no_peaks")
def test_sides_take_turns_on_the_same_pixels_and_parameters(monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    seen: list[tuple[str, int, int]] = []
    models: list[LlavaForConditionalGeneration] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append((EAGER if is_reference() else FUSED, inputs[0].data_ptr(), next(module.parameters()).data_ptr()))

    def load(*arguments: object) -> subject.Subject:
        prepared = prepare(options)

        def build() -> LlavaForConditionalGeneration:
            models.append(prepared.build())
            models[0].model.vision_tower.register_forward_pre_hook(look)
            return models[0]

        return replace(prepared, build=build)

    steps: list[str] = []
    found = comparing.compare(options, load(), 2, steps.append)
    # One pair to warm up and compare, then the timed pairs, each of which starts with another side.
    assert [side for side, _, _ in seen] == [EAGER, FUSED, EAGER, FUSED, FUSED, EAGER]
    assert len({pixels for _, pixels, _ in seen}) == 1
    assert len({weights for _, _, weights in seen}) == 1
    assert len(models) == 1
    assert len(steps) == comparing.stage_count(2, found.subject.device)
    assert {side: len(runs) for side, runs in found.runs.items()} == {EAGER: 2, FUSED: 2}


@pytest.mark.usefixtures("no_peaks")
def test_optimized_runs_are_those_of_the_fused_side(options: Options) -> None:
    optimized = replace(options, optimize=True)
    built = prepare(optimized)
    model = built.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    served: list[bool] = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, _: served.append(module.route is not None and not module.route.report.paused)
    )
    found = comparing.compare(optimized, replace(built, build=lambda: model), 1, lambda name: None)
    assert served == [False, True, False, True]
    assert not found.agreement.failures
    assert found.agreement.first_difference is None
    assert any(line.startswith("ViT: 4 of 4 layers") for line in found.optimized or [])
    assert any(line.startswith("decoding: left alone") for line in found.optimized or [])
    assert result.verdict(found).startswith("OK: optimized agrees with eager")
    assert "ViT" not in result.same_code(found)
    assert model.model.vision_tower.route.report.paused
    assert model.model.vision_tower.route.report.plain == {"the optimization is paused": 2}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert result.to_json(found)["optimized"] == found.optimized


@pytest.mark.usefixtures("no_peaks")
def test_the_command_says_what_was_optimized(model_dir: Path) -> None:
    arguments = [
        "compare",
        "--model",
        str(model_dir),
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--runs",
        "1",
        "--optimize",
    ]
    ended = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert ended.exit_code == 0, ended.output
    assert "optimized: ViT: 4 of 4 layers" in ended.stdout
    assert ended.stdout.strip().splitlines()[-1].startswith("OK: optimized agrees with eager and is")


@pytest.mark.usefixtures("no_peaks")
def test_a_wrong_optimization_fails(monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    monkeypatch.setattr(layers, "SHARPNESS", 1.5)
    found = compared(replace(options, optimize=True))
    assert "vision features differ" in found.agreement.failures[0]


@pytest.mark.usefixtures("no_peaks")
def test_runs_stop_when_time_is_short_unless_asked_for(monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    monkeypatch.setattr(comparing, "BUDGET_SECONDS", 0.0)
    short = compared(options, runs=None)
    assert len(short.runs[FUSED]) == len(short.runs[EAGER]) == 1
    assert any("1 of 3 runs" in note for note in short.notes)
    assert len(compared(options, runs=2).runs[FUSED]) == 2


@pytest.mark.usefixtures("no_peaks")
def test_a_busy_processor_is_noted(monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    readings = iter([0.0, 1000.0])
    monkeypatch.setattr(comparing, "busy_seconds", lambda: next(readings))
    assert any("times are unreliable" in note for note in compared(options).notes)
    monkeypatch.setattr(comparing, "busy_seconds", lambda: 0.0)
    assert not any("times are unreliable" in note for note in compared(options).notes)


def test_the_answer_is_what_generate_gives(options: Options) -> None:
    prepared = prepare(options)
    model = prepared.build()
    # A checkpoint's own default changes nothing.
    model.generation_config.num_beams = 3
    run = an_answer(model, prepared.inputs, 12)
    never = model.generation_config.suppress_tokens
    assert never == [model.config.image_token_index]
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, num_beams=1, suppress_tokens=never, pad_token_id=0)
    # Without an end-of-sequence token `generate` does not stop early either.
    model.generation_config.eos_token_id = None
    with mra_kernels.use_backend("reference"):
        expected = model.generate(**prepared.inputs, generation_config=settings)
    assert run.tokens == expected[0, prepared.inputs["input_ids"].shape[1] :].tolist()
    assert len(run.margins) == 12
    assert all(margin > 0 for margin in run.margins)


def test_the_image_token_is_never_answered(options: Options) -> None:
    prepared = prepare(options)
    model = prepared.build()
    image = model.config.image_token_index
    with torch.no_grad(), mra_kernels.use_backend("reference"):
        hidden = model.model(**prepared.inputs).last_hidden_state[0, -1]
        model.lm_head.weight[image] = 100 * hidden
        assert int(model(**prepared.inputs).logits[0, -1].argmax()) == image
    run = an_answer(model, prepared.inputs, 3)
    assert image not in run.tokens


def test_parts_cover_every_parameter_once(tiny_model: LlavaForConditionalGeneration) -> None:
    parts = measure.parts_of(tiny_model)
    tower = parts.pop(measure.TOWER)
    assert tower == [tiny_model.model.vision_tower]
    found = [id(p) for modules in parts.values() for module in modules for p in module.parameters()]
    assert len(found) == len(set(found))
    # The position embedding is a bare parameter, added between two modules.
    rest = {name for name, p in tiny_model.named_parameters() if id(p) not in set(found)}
    assert rest == {"model.vision_tower.low.position_embedding"}


def test_parts_of_a_model_without_adapters() -> None:
    assert "adapters" not in measure.parts_of(build_model(make_tiny_config(adapters=False)))


def test_parts_add_up_and_leave_no_hooks(options: Options) -> None:
    prepared = prepare(options)
    model = prepared.build()
    run = measure.answer(model, prepared.inputs, 2, measure.parts_of(model))
    assert all(seconds > 0 for seconds in run.parts.values())
    inside = ("stem", "stage 1", "stage 2", "stage 3", "stage 4", "ViT", "adapters", "merge")
    assert sum(run.parts[name] for name in inside) <= run.parts[measure.TOWER] <= run.first_token
    total = sum(seconds for name, seconds in run.parts.items() if name != measure.TOWER)
    assert total == pytest.approx(run.first_token)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_outputs_are_the_towers_features_and_every_logit(options: Options) -> None:
    prepared = prepare(options)
    model = prepared.build()
    found = measure.outputs(model, prepared.inputs, Way("reference"))
    with torch.no_grad(), mra_kernels.use_backend("reference"):
        features = model.model.vision_tower(prepared.inputs["pixel_values"]).last_hidden_state
        logits = model(**prepared.inputs).logits
    assert torch.equal(found.vision_features, features)
    assert torch.equal(found.logits, logits)


def test_peak_memory_of_a_failing_process_is_a_result(options: Options, tmp_path: Path) -> None:
    peak = measure_peak(replace(options, model=str(tmp_path / "gone")), Way("reference"))
    assert peak.peak is None
    assert "gone" in str(peak.problem)


# How it judges.


@pytest.mark.usefixtures("no_peaks")
def test_slower_parts_are_named(options: Options) -> None:
    found = compared(options)
    slow = {name: 2 * seconds for name, seconds in found.runs[EAGER][0].parts.items()}
    fused = replace(found.runs[EAGER][0], parts=slow, reached=[0.5 * moment for moment in found.runs[EAGER][0].reached])
    line = result.verdict(replace(found, runs={EAGER: found.runs[EAGER], FUSED: [fused]}))
    assert "is 2.00x as fast to the first token" in line
    assert "adapters 0.50x" in line
    # What no kernel of ours touches is noise, not a loss.
    assert "projector" not in line


# What it is given.


def test_a_model_with_a_tokenizer_gets_the_prompt_at_any_size(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(data_dir / "llava_data")
    processor = build_processor(tokenizer, 128, grid=4)
    build_model(make_tiny_config()).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for side, grid in ((128, 4), (256, 8)):
        prepared = prepare(Options(model=str(tmp_path), prompt="Which animal?", size=side, device="cpu"))
        ids = prepared.inputs["input_ids"][0]
        assert int((ids == 640).sum()) == grid**2
        assert prepared.inputs["pixel_values"].shape == (1, 3, side, side)
        assert prepared.inputs["pixel_values"].dtype == torch.float32
        assert tokenizer.decode(ids[ids != 640]).endswith("\nWhich animal? ASSISTANT:")
        assert prepared.notes == []


def test_fixed_token_ids_stand_for_a_prompt(options: Options) -> None:
    ids = prepare(options).inputs["input_ids"][0].tolist()
    assert ids[0] == 1
    assert ids.count(640) == 16
    assert all(3 <= token < 640 for token in ids[1:] if token != 640)
    with pytest.raises(ValueError, match="no processor"):
        prepare(replace(options, prompt="Why?"))


def test_without_photo_and_repository_a_picture_is_drawn(monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    photo = prepare(options)
    assert photo.picture == subject.PHOTO
    monkeypatch.setattr(subject, "checkout", lambda: None)
    drawn = prepare(options)
    assert drawn.picture == "drawn"
    assert any("--image" in note for note in drawn.notes)
    pixels = drawn.inputs["pixel_values"]
    assert not torch.equal(pixels, photo.inputs["pixel_values"])
    assert pixels.std() > 0.5


def test_the_default_is_the_full_size_tower() -> None:
    prepared = prepare(Options(device="cpu"))
    assert (prepared.name, prepared.side) == ("llava-hr-cpu", 1024)
    assert prepared.inputs["pixel_values"].shape == (1, 3, 1024, 1024)
    assert int((prepared.inputs["input_ids"] == 640).sum()) == 1024
    assert any("random weights" in note for note in prepared.notes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("no_peaks")
def test_on_a_gpu_parts_are_timed_by_events(options: Options) -> None:
    found = compared(replace(options, device="cuda"), runs=2)
    assert not found.agreement.failures
    assert all(seconds > 0 for run in found.runs[FUSED] for name, seconds in run.parts.items() if name != measure.REST)
