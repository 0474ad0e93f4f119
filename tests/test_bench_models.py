"""The benchmarks of whole models on a CPU: sizes of what is compared; rehearsals of answers, training and traces."""

import gzip
import json
import math
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.models import LLAVA_15, LLAVA_HR, TINY, Subject, make_inputs, make_labels, tiny_side
from bench.stamp import ROOT
from bench.step import Result, Run
from bench.suites import e2e, profile, train
from mra_kernels.dispatch import Backend
from mra_kernels.ops import OPS
from mra_model.compare import measure
from mra_model.compare.measure import Way
from mra_model.memory import NotEnoughMemory

CPU = torch.device("cpu")
BF16 = torch.bfloat16

SIDES = {LLAVA_HR: (384, 768, 1024, 1536), LLAVA_15: (336, 448, 672, 1022)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and on a busy machine they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def found() -> list[Result]:
    return []


@pytest.fixture
def rehearsal(tmp_path: Path, found: list[Result]) -> Run:
    return Run(CPU, True, tmp_path, found.append)


def plant(monkeypatch: pytest.MonkeyPatch, op: str, forward: float, backward: float) -> None:
    """Gives `op` a native kernel whose result, and whose gradients, are the reference's times a factor."""
    operator = OPS[op]

    def scaled(outputs: object, factor: float) -> object:
        return outputs * factor if isinstance(outputs, Tensor) else tuple(output * factor for output in outputs)

    kernel = Backend(
        lambda *inputs: scaled(operator._run_forward(*inputs, "reference"), forward),
        lambda *inputs: scaled(operator._run_backward(*inputs, "reference"), backward),
        lambda device, dtype: None,
    )
    monkeypatch.setitem(operator.backends, "native", kernel)


def by_variant(found: list[Result]) -> dict[str, Result]:
    assert len({result.case for result in found}) == 1
    return {result.variant: result for result in found}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class TestSizes:
    def test_llava_15_is_the_published_one(self) -> None:
        """llava-hf/llava-1.5-7b-hf has 7,063,427,072 parameters, 64 rows of its vocabulary beyond Vicuna's 32000."""
        model = Subject(LLAVA_15, "7B", 336, BF16).build("meta")
        assert count(model) + 2 * 63 * 4096 == 7_063_427_072
        assert 13.3e9 < count(Subject(LLAVA_15, "13B", 336, BF16).build("meta")) < 13.4e9

    @pytest.mark.parametrize(("language", "trunk", "rows"), [("7B", 196.2e6, 4096), ("13B", 843.4e6, 5120)])
    def test_llava_hr_has_the_towers_of_the_paper(self, language: str, trunk: float, rows: int) -> None:
        """Trunks of ConvNeXt-L and -XXL as timm has them, less their heads and last norm; CLIP ViT-L in both."""
        inner = Subject(LLAVA_HR, language, 1024, BF16).build("meta").model
        assert count(inner.vision_tower.high) == pytest.approx(trunk, rel=2e-3)
        assert count(inner.vision_tower.low) == pytest.approx(303.5e6, rel=2e-3)
        assert inner.multi_modal_projector.linear_2.out_features == rows

    def test_both_families_share_the_language_model(self) -> None:
        for language in ("7B", "13B", "small"):
            ours, theirs = (Subject(family, language, SIDES[family][0], BF16).config() for family in SIDES)
            assert ours.text_config.to_dict() == theirs.text_config.to_dict()

    @pytest.mark.parametrize(
        ("family", "tokens"), [(LLAVA_HR, (576, 576, 1024, 2304)), (LLAVA_15, (576, 1024, 2304, 5329))]
    )
    @pytest.mark.parametrize("language", ["7B", "13B", "small"])
    def test_visual_tokens_are_those_of_the_paper(self, family: str, tokens: tuple[int, ...], language: str) -> None:
        found = [Subject(family, language, side, BF16).config().image_seq_length for side in SIDES[family]]
        assert found == list(tokens)

    def test_unknown_names_and_sides_are_refused(self) -> None:
        for subject, message in (
            (Subject("LLaVA-2", "7B", 336, BF16), "LLaVA-HR, LLaVA-1.5"),
            (Subject(LLAVA_15, "70B", 336, BF16), "7B, 13B, small"),
            (Subject(LLAVA_15, "7B", 1024, BF16), "multiple of 14"),
            (Subject(LLAVA_HR, "7B", 1022, BF16), "992 and 1024|1024"),
        ):
            with pytest.raises(ValueError, match=message):
                subject.config()


class TestInputs:
    def test_a_question_has_the_picture_in_its_middle(self) -> None:
        config = Subject(LLAVA_HR, "7B", 1024, BF16).config()
        inputs = make_inputs(config, torch.device("meta"), batch=2)
        assert inputs["input_ids"].shape == (2, 1024 + 64)
        assert inputs["pixel_values"].shape == (2, 3, 1024, 1024)
        config = Subject(LLAVA_HR, TINY, 128, BF16).config()
        ids = make_inputs(config, CPU)["input_ids"][0]
        assert ids[0] == config.text_config.bos_token_id
        assert (ids == config.image_token_index).nonzero().flatten().tolist() == list(range(32, 48))
        assert ids.max() == config.image_token_index < config.text_config.vocab_size

    def test_only_the_text_after_the_picture_is_asked_for(self) -> None:
        labels = make_labels(torch.tensor([[1, 5, 9, 9, 6, 7]]), 9)
        assert labels.tolist() == [[-100, -100, -100, -100, 6, 7]]

    def test_llava_15_reads_the_last_layer_but_one(self) -> None:
        model = Subject(LLAVA_15, TINY, 56, torch.float32).build(CPU)
        inputs = make_inputs(model.config, CPU)
        with torch.no_grad():
            before = model(**inputs).logits
            layers = model.model.vision_tower.encoder.layers
            layers[-1].mlp.fc1.weight.zero_()
            assert torch.equal(model(**inputs).logits, before)
            layers[-2].mlp.fc1.weight.zero_()
            assert not torch.equal(model(**inputs).logits, before)


class TestAnswers:
    @pytest.mark.parametrize(
        ("family", "variants"), [(LLAVA_HR, ["eager", "fused", "optimized"]), (LLAVA_15, ["eager", "optimized"])]
    )
    def test_a_row_of_the_table(self, rehearsal: Run, found: list[Result], family: str, variants: list[str]) -> None:
        side = SIDES[family][0]
        e2e.run(rehearsal, family=family, language="7B", side=side)
        assert [result.variant for result in found] == variants
        for result in by_variant(found).values():
            tiny = {"language": TINY, "side": tiny_side(family, side)}
            dtype = {"dtype": result.labels["dtype"]}
            assert result.labels == {"suite": "e2e", "model": family} | tiny | dtype
            assert result.failure is None
            assert list(result.times) == ["first token", "10 tokens", "64 tokens"]
            first, ten, all_of_them = (times.median for times in result.times.values())
            assert 0 < first < ten < all_of_them
            assert list(result.parts) == ["tower", "projector", "language model", measure.REST]
            assert sum(result.parts.values()) == pytest.approx(first)
            facts = result.facts
            assert facts["visual tokens"] == 16
            assert facts["prompt tokens"] == 16 + 64
            assert facts["tower's share of the first token"] == pytest.approx(result.parts["tower"] / first, rel=1e-3)
            assert facts["tokens per second over 10"] == pytest.approx(10 / (ten * 1e-6), rel=1e-3)
            assert facts["tokens per second over 64"] == pytest.approx(64 / (all_of_them * 1e-6), rel=1e-3)
            assert facts["peak bytes"] > facts["weights bytes"] > 1e5

    def test_llava_15_has_nothing_to_optimize_on_a_cpu(self, rehearsal: Run) -> None:
        real = replace(rehearsal, rehearsal=False)
        assert [len(e2e._variants(real, family)) for family in (LLAVA_HR, LLAVA_15)] == [3, 1]

    @pytest.mark.parametrize("factor", [1.5, math.nan])
    def test_a_wrong_kernel_has_no_times(
        self, monkeypatch: pytest.MonkeyPatch, rehearsal: Run, found: list[Result], factor: float
    ) -> None:
        plant(monkeypatch, "depthwise_conv_norm", factor, 1.0)
        e2e.run(rehearsal, family=LLAVA_HR, language="7B", side=1024)
        results = by_variant(found)
        assert results["fused"].failure.startswith("wrong: vision features")
        assert not results["fused"].times
        assert not results["fused"].parts
        assert results["eager"].failure is None
        assert results["eager"].times

    def test_wrong_logits_alone_are_refused(self) -> None:
        """The features agree; the language model of the second variant does not."""
        model = Subject(LLAVA_HR, TINY, 128, torch.float32).build(CPU)
        inputs = make_inputs(model.config, CPU)
        calls = iter([1.0, 1.1])
        model.lm_head.register_forward_hook(lambda module, args, output: output * next(calls))
        facts, failures = e2e.check(
            model, inputs, {"eager": Way("reference"), "again": Way("reference")}, torch.float32
        )
        assert facts["again"]["features differ by"] == 0
        assert failures["again"].startswith("wrong: logits differ by 1.00e-01")

    def test_without_a_baseline_nothing_is_believed(self) -> None:
        model = Subject(LLAVA_HR, TINY, 128, torch.float32).build(CPU)
        calls = iter([math.nan, 1.0])
        model.lm_head.register_forward_hook(lambda module, args, output: output * next(calls))
        variants = {"eager": Way("reference"), "fused": Way("auto")}
        failures = e2e.check(model, make_inputs(model.config, CPU), variants, torch.float32)[1]
        assert "not finite" in failures["eager"]
        assert failures["fused"].startswith("not checked")

    def test_peak_of_a_process_of_its_own(self) -> None:
        subject = Subject(LLAVA_15, TINY, 56, BF16)
        peak = e2e.peak_in_new_process(subject, Way("reference"))
        weights = sum(parameter.nbytes for parameter in subject.build("meta").parameters())
        assert weights < peak < 2**30

    @pytest.mark.parametrize(("tokens", "equal"), [([1, 2, 3], 3), ([1, 9, 3], 1), ([9, 2, 3], 0)])
    def test_equal_tokens_are_counted_to_the_first_difference(self, tokens: list[int], equal: int) -> None:
        assert e2e._equal([1, 2, 3], tokens) == equal


class TestTraining:
    @pytest.mark.parametrize(("stage", "checkpointing"), [(1, False), (2, True)])
    def test_a_step(self, rehearsal: Run, found: list[Result], stage: int, checkpointing: bool) -> None:
        train.run(rehearsal, stage=stage, checkpointing=checkpointing)
        assert [result.variant for result in found] == ["eager", "fused"]
        for result in by_variant(found).values():
            setting = {"suite": "train", "stage": stage, "batch": 2, "checkpointing": checkpointing}
            side = tiny_side(LLAVA_HR, train.STAGES[stage].side)
            assert result.labels == setting | {"language": TINY, "side": side, "dtype": result.labels["dtype"]}
            assert result.failure is None
            step = result.times["step"].median
            assert sum(result.parts.values()) == pytest.approx(step, rel=1e-3)
            assert all(result.parts[name] > 0 for name in ("forward", "backward"))
            assert result.facts["peak bytes"] > result.facts["weights bytes"]
            assert result.facts["hours estimate"] == train.hours(train.STAGES[stage].samples, 2, step / 1e6)
            assert "estimate" in result.facts["hours are"]
            assert "optimizer" in result.facts["not in the step"]
        assert set(found[1].facts["gradients differ by"]) == set(train.STAGES[stage].checked)

    def test_hours(self) -> None:
        # Eight devices do 8 * 16 samples in 4 s, 32 a second.
        assert train.hours(115_200, 16, 4.0) == 1.0

    def test_stage_1_trains_projector_and_merge_only(self) -> None:
        model = train.prepare(Subject(LLAVA_HR, TINY, 64, BF16, False), 1, CPU, checkpointing=False)
        assert len(model.model.vision_tower.adapters) == 0
        train.step(model, train.make_batch(model, 1, 1, CPU), "auto")
        trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        owners = {name.removeprefix("model.").split(".")[0] for name in trained}
        assert owners == {"vision_tower", "multi_modal_projector"}
        assert {name for name in trained if "vision_tower" in name} == {
            f"model.vision_tower.merge.{which}_{kind}" for which in ("low", "high") for kind in ("weight", "bias")
        }

    def test_stage_2_trains_everything_that_is_used(self) -> None:
        model = train.prepare(Subject(LLAVA_HR, TINY, 128, BF16), 2, CPU, checkpointing=True)
        assert model.is_gradient_checkpointing
        train.step(model, train.make_batch(model, 2, 1, CPU), "auto")
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

    @pytest.mark.parametrize(
        ("forward", "backward", "message"),
        [(1.0, 1.5, "the gradient of model.vision_tower.high"), (math.nan, 1.0, "loss")],
    )
    def test_a_wrong_kernel_has_no_times(
        self,
        monkeypatch: pytest.MonkeyPatch,
        rehearsal: Run,
        found: list[Result],
        forward: float,
        backward: float,
        message: str,
    ) -> None:
        plant(monkeypatch, "depthwise_conv_norm", forward, backward)
        train.run(rehearsal, stage=2, checkpointing=False)
        results = by_variant(found)
        assert results["fused"].failure.startswith("wrong: ")
        assert message in results["fused"].failure
        assert not results["fused"].times
        assert "hours estimate" not in results["fused"].facts
        assert results["eager"].failure is None
        assert results["eager"].times

    def test_a_batch_that_does_not_fit_is_halved(
        self, monkeypatch: pytest.MonkeyPatch, rehearsal: Run, found: list[Result]
    ) -> None:
        real = train._first_step

        def first_step(model, inputs, stage, backend):
            if len(inputs["input_ids"]) > 1:
                raise torch.OutOfMemoryError("planted")
            return real(model, inputs, stage, backend)

        monkeypatch.setattr(train, "_first_step", first_step)
        train.run(rehearsal, stage=1, checkpointing=False)
        assert [result.labels["batch"] for result in found] == [1, 1]
        assert all(result.times for result in found)

    def test_where_nothing_fits_it_says_so(
        self, monkeypatch: pytest.MonkeyPatch, rehearsal: Run, found: list[Result]
    ) -> None:
        def first_step(*_: object) -> None:
            raise torch.OutOfMemoryError("planted")

        monkeypatch.setattr(train, "_first_step", first_step)
        train.run(rehearsal, stage=1, checkpointing=False)
        assert [result.failure for result in found] == ["OutOfMemoryError: planted"] * 2


class TestProfile:
    @pytest.mark.parametrize("what", ["vision", "generate", "train"])
    def test_tables_and_one_trace(self, rehearsal: Run, found: list[Result], what: str) -> None:
        profile.run(rehearsal, what=what)
        assert [result.variant for result in found] == ["eager", "fused"]
        for result in by_variant(found).values():
            assert result.labels["suite"] == "profile"
            assert result.labels["what"] == what
            assert result.facts == {"trace": f"trace-{what}.json.gz"}
            assert 0 < len(result.kernels) <= 16
            assert result.launches >= sum(kernel["calls"] for kernel in result.kernels)
        assert [path.name for path in rehearsal.folder.iterdir()] == [f"trace-{what}.json.gz"]
        text = gzip.decompress((rehearsal.folder / f"trace-{what}.json.gz").read_bytes()).decode()
        for private in (
            str(ROOT),
            str(rehearsal.folder),
            str(Path.home()),
            "/tmp/",
            ".py",
            f'"{socket.gethostname()}"',
        ):
            assert private not in text
        events = json.loads(text)["traceEvents"]
        names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
        assert sorted(names.values()) == ["eager: CPU", "fused: CPU"]
        ran = {name: {e["name"] for e in events if names[e["pid"]] == name} for name in names.values()}
        # Only one of the two calls a kernel of this package, if the machine can run any.
        assert not any(name.startswith("mra::") for name in ran["eager: CPU"])
        for name in names.values():
            assert min(e["ts"] for e in events if e["ph"] == "X" and names[e["pid"]] == name) == 0

    def test_unknown(self, rehearsal: Run) -> None:
        with pytest.raises(ValueError, match="vision, generate, train"):
            profile.run(rehearsal, what="everything")

    def test_gpu_events_keep_their_arrows_and_lose_the_rest(self, tmp_path: Path) -> None:
        """As the profiler writes them with a GPU: a launch, its kernel, the arrow between them, and a source line."""
        grid = {"grid": [1, 2, 3], "device": 0}
        host, device = {"pid": 4711, "tid": 4712}, {"pid": 0, "tid": 7}
        events = [
            {
                "ph": "X",
                "cat": "cuda_runtime",
                "name": "launch",
                "ts": 100.5,
                "dur": 4.0,
                **host,
                "args": {"stream": 1},
            },
            {"ph": "s", "id": 1, "cat": "ac2g", "name": "ac2g", "ts": 100.5, **host},
            {"ph": "f", "id": 1, "cat": "ac2g", "name": "ac2g", "ts": 110.5, "bp": "e", **device},
            {"ph": "X", "cat": "kernel", "name": "k", "ts": 110.5, "dur": 9.0, **device, "args": grid},
            {"ph": "X", "cat": "python_function", "name": "/secret/file.py(3): f", "ts": 90.0, "dur": 50.0, **host},
            {"ph": "M", "name": "process_labels", **host, "args": {"labels": "/secret"}},
        ]
        assert profile.write_trace(tmp_path / "trace.json.gz", {"eager": events, "fused": events}) == 0
        text = gzip.decompress((tmp_path / "trace.json.gz").read_bytes()).decode()
        assert "secret" not in text
        assert "4711" not in text
        kept = json.loads(text)["traceEvents"]
        names = [event["args"]["name"] for event in kept if event["name"] == "process_name"]
        assert names == ["eager: CPU", "eager: GPU 0", "fused: CPU", "fused: GPU 0"]
        kernels = [event for event in kept if event.get("cat") == "kernel"]
        assert [kernel["ts"] for kernel in kernels] == [10.0, 10.0]
        assert kernels[0]["args"] == {"grid": [1, 2, 3]}
        assert kernels[0]["pid"] != kernels[1]["pid"]
        arrows = [event for event in kept if event.get("cat") == "ac2g"]
        assert [arrow["id"] for arrow in arrows] == ["0.1", "0.1", "1.1", "1.1"]

    def test_a_trace_that_is_too_long_keeps_the_longest(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(profile, "MOST_EVENTS", 5)
        at = {"ph": "X", "cat": "cpu_op", "pid": 1, "tid": 1}
        events = [{**at, "name": f"op {index}", "ts": float(index), "dur": float(index)} for index in range(10)]
        assert profile.write_trace(tmp_path / "trace.json.gz", {"eager": events}) == 7
        kept = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
        assert [event["name"] for event in kept] == ["process_name", "thread_name", "op 9", "op 8", "op 7"]


@pytest.mark.parametrize("suite", ["e2e", "train", "profile"])
def test_a_model_that_does_not_fit_is_a_result(
    monkeypatch: pytest.MonkeyPatch, rehearsal: Run, found: list[Result], suite: str
) -> None:
    def refuse(*_: object) -> None:
        raise NotEnoughMemory("planted")

    monkeypatch.setattr("mra_model.presets.require_memory", refuse)
    if suite == "e2e":
        e2e.run(rehearsal, family=LLAVA_HR, language="13B", side=1536)
    elif suite == "train":
        train.run(rehearsal, stage=2, checkpointing=True)
    else:
        profile.run(rehearsal, what="generate")
    assert [result.variant for result in found] == ["eager", "fused", "optimized"][: 3 if suite == "e2e" else 2]
    assert {result.failure for result in found} == {"NotEnoughMemory: planted"}
    assert not any(result.times or result.kernels for result in found)
