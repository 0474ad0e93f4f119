"""The command `mra`: what it prints, how it ends, and that wrong input ends in one clear line."""

import functools
import json
import os
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_config
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, TextStreamer
from typer.testing import CliRunner

import mra_kernels
import mra_model
from mra_kernels.ops import OPS
from mra_model import build_model, build_processor, doctor, environment, load_image, load_tokenizer
from mra_model.cli import app
from mra_model.generation import ModelFolderError, load_model

PROMPT = "What is this?"
TOKENS = 24
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """A tiny model with random weights, saved with processor and tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    build_model(make_tiny_config()).save_pretrained(folder)
    build_processor(load_tokenizer(data_dir / "llava_data"), 128, grid=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def golden(data_dir: Path) -> Path:
    return data_dir / "llava_hr_tiny_384_noadapter"


def run(*args: object, **env: str) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200", **env})


def assert_one_line(result: Any, code: int, *words: str) -> None:
    """Ended with `code` and one line on stderr that has all `words`; no traceback."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in result.output


# mra doctor


def test_doctor_as_a_program_reports_every_op() -> None:
    command = [sys.executable, "-m", "mra_model.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["versions"]["torch"] == torch.__version__
    assert report["extension"]["state"] in ("present", "absent")
    assert (report["gpu_problem"] is None) == torch.cuda.is_available()
    found = {(record["op"], record["device"], record["dtype"]): record for record in report["backends"]}
    assert set(found) == {
        (op, device, dtype) for op in OPS for device in doctor.DEVICES for dtype in environment.DTYPES
    }
    for record in found.values():
        assert record["chosen"] not in record["reasons"]
        assert record["measured"] == (record["device"] == "cpu" or record["dtype"] == "bfloat16")


def test_doctor_shows_choices_and_reasons() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    for op in OPS:
        assert op in result.stdout
    assert "unmeasured" in result.stdout
    assert "triton on cpu: no Triton kernels for device type cpu" in result.stdout


@pytest.mark.parametrize(
    ("quota", "usable"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), (None, 4)]
)
def test_doctor_warns_of_more_threads_than_cpus(
    quota: str | None, usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(quota + "\n")
    monkeypatch.setattr(environment, "_CPU_QUOTA", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert environment.usable_cpus() == usable
    assert (f"OMP_NUM_THREADS={usable}" in run("doctor").stdout) == (usable < 4)


def test_doctor_tells_an_absent_extension_from_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, Any]:
        raise ImportError("undefined symbol: foo")

    monkeypatch.setattr(mra_kernels, "build_info", fail)
    monkeypatch.setattr(doctor, "find_spec", lambda name: object() if name == "mra_kernels._C" else None)
    assert doctor.extension_state()["state"] == "broken"
    broken = run("doctor")
    assert broken.exit_code == 1
    assert "undefined symbol: foo" in broken.stdout
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert doctor.extension_state()["state"] == "absent"
    assert run("doctor").exit_code == 0


# mra convert, mra export


def test_convert_and_export_report_what_they_did(golden: Path, tmp_path: Path) -> None:
    converted = run("convert", golden, tmp_path / "new", "--arch", golden / "arch.json", "--dtype", "bf16", "--keys")
    assert converted.exit_code == 0, converted.output
    assert "class_embedding" in converted.stdout
    assert "keys renamed" in converted.stdout
    assert "model.mm_projector.0.weight -> model.multi_modal_projector.linear_1.weight" in converted.stdout
    assert "warning: the source has no tokenizer" in converted.stdout
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "new")
    assert model.dtype == torch.bfloat16
    exported = run("export", tmp_path / "new", tmp_path / "back")
    assert exported.exit_code == 0, exported.output
    assert json.loads((tmp_path / "back" / "config.json").read_text())["is_multipath_encoder"] is True


def test_convert_errors_are_one_line(golden: Path, tmp_path: Path) -> None:
    assert_one_line(run("convert", tmp_path / "absent", tmp_path / "new"), 1, "absent")
    assert_one_line(run("convert", golden, golden), 1, "exists already")
    assert_one_line(run("convert", golden, tmp_path / "new", "--dtype", "int8"), 2, "int8", "bfloat16")
    assert_one_line(run("export", golden, tmp_path / "new"), 1, "config.json")
    assert not (tmp_path / "new").exists()


# mra generate


def expected_answer(folder: Path, text: str, pictures: list[Path], count: int) -> str:
    """What stock transformers answers to a prompt written out by hand."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    images = [load_image(picture) for picture in pictures] or None
    inputs = processor(text=[text], images=images, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("names", [[], ["chelsea.png"], ["chelsea.png", "rocket.jpg"]])
def test_generate_answers_about_any_number_of_pictures(model_dir: Path, data_dir: Path, names: list[str]) -> None:
    pictures = [data_dir / "llava_data" / name for name in names]
    options = [part for picture in pictures for part in ("--image", picture)]
    result = run("generate", model_dir, "--prompt", PROMPT, "--max-new-tokens", 6, "--device", "cpu", *options)
    assert result.exit_code == 0, result.output
    text = f"{SYSTEM} USER: " + "<image>\n" * len(names) + f"{PROMPT} ASSISTANT:"
    expected = expected_answer(model_dir, text, pictures, 6)
    assert expected
    assert result.stdout.strip() == expected


def ask(folder: Path) -> Any:
    return run("generate", folder, "--prompt", PROMPT, "--max-new-tokens", TOKENS, "--device", "cpu")


def test_generate_prints_words_as_they_come(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has reached the reader before each step of the model: more and more of the answer, never all of it."""
    forward, printed = LlavaForConditionalGeneration.forward, []

    @functools.wraps(forward)
    def watched(*args, **kwargs):
        printed.append(sys.stdout.buffer.getvalue().decode())
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", watched)
    answer = ask(model_dir).stdout
    assert printed[0] == ""
    assert all(answer.startswith(part) for part in printed)
    # A word may be several tokens.
    assert len(set(printed)) > 3
    assert answer.strip() != printed[-1].strip()


def with_defaults(folder: Path, copy: Path, **defaults: object) -> Path:
    """A copy of a model with other defaults of generation."""
    shutil.copytree(folder, copy)
    file = copy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | defaults))
    return copy


def test_generate_is_greedy_whatever_the_checkpoint_defaults_to(model_dir: Path, tmp_path: Path) -> None:
    answer = ask(with_defaults(model_dir, tmp_path / "beams", num_beams=3, do_sample=True, temperature=2.0))
    assert answer.exit_code == 0, answer.output
    assert answer.stdout == ask(model_dir).stdout


def test_generate_prints_no_special_tokens(model_dir: Path, tmp_path: Path) -> None:
    answer = ask(with_defaults(model_dir, tmp_path / "ended", forced_eos_token_id=2)).stdout
    assert answer.strip()
    assert "</s>" not in answer


def test_generate_interrupted(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of an answer: what came stays, and the message has a line of its own."""
    whole = ask(model_dir).stdout
    put, calls = TextStreamer.put, count()

    def interrupted(streamer: TextStreamer, value: torch.Tensor) -> None:
        if next(calls) == TOKENS // 2:
            raise KeyboardInterrupt
        put(streamer, value)

    monkeypatch.setattr(TextStreamer, "put", interrupted)
    answer = ask(model_dir)
    assert answer.exit_code == 130
    assert answer.stdout.strip()
    assert whole.startswith(answer.stdout.removesuffix("\n"))
    assert answer.output.splitlines()[-1] == "interrupted"


def test_generate_errors_are_one_line(model_dir: Path, data_dir: Path, golden: Path, tmp_path: Path) -> None:
    assert_one_line(run("generate", model_dir, "--prompt", PROMPT, "--image", "none.png"), 2, "none.png")
    assert_one_line(run("generate", model_dir, "--prompt", PROMPT, "--dtype", "int8"), 2, "int8")
    assert_one_line(run("generate", tmp_path / "none", "--prompt", PROMPT), 1, "none", "no folder")
    assert_one_line(run("generate", golden, "--prompt", PROMPT), 1, "mra convert")
    bare = tmp_path / "bare"
    shutil.copytree(model_dir, bare, ignore=shutil.ignore_patterns("processor_config.json"))
    assert_one_line(run("generate", bare, "--prompt", PROMPT), 1, "--tokenizer")


def test_damaged_weights_are_refused(model_dir: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model_dir, damaged)
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelFolderError, match="weights cannot be read"):
        load_model(damaged)


def test_missing_weights_are_refused(model_dir: Path, tmp_path: Path) -> None:
    # Saved without adapters, but the config asks for them.
    build_model(make_tiny_config(adapters=False)).save_pretrained(tmp_path)
    shutil.copy(model_dir / "config.json", tmp_path / "config.json")
    with pytest.raises(ModelFolderError, match=r"lacks \d+ tensors, model.vision_tower.adapters"):
        load_model(tmp_path)


# mra compare: what it refuses. What it measures is in test_compare.py.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "llava-hr-9b"], ["llava-hr-9b", "llava-hr-cpu"]),
        (["--dtype", "int8"], ["int8", "bfloat16"]),
        (["--device", "tpu"], ["tpu", "cpu"]),
        (["--device", "cpu:1"], ["cpu:1"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--image", "none.png"], ["none.png"]),
        (["--size", "1000"], ["1000", "992", "1024"]),
        (["--model", "nowhere"], ["nowhere"]),
        (["--model", "nowhere", "--preset", "llava-hr-cpu"], ["--model", "--preset"]),
        (["--prompt", "Why?"], ["--prompt", "--model"]),
        (["--json", "no/such/folder.json"], ["no/such"]),
    ],
)
def test_compare_refuses_wrong_options_in_one_line(options: list[str], words: list[str]) -> None:
    assert_one_line(run("compare", *options), 2, *words)


def test_compare_refuses_two_eager_sides_and_absent_kernels() -> None:
    assert_one_line(run("compare", MRA_BACKEND="reference"), 2, "MRA_BACKEND=reference")
    assert_one_line(run("compare", "--device", "cpu", MRA_BACKEND="triton"), 1, "no Triton kernels for device type cpu")


def test_nothing_trusts_remote_code() -> None:
    for package in (mra_model, mra_kernels):
        for file in Path(package.__file__).parent.rglob("*.py"):
            assert "trust_remote_code" not in file.read_text(encoding="utf-8"), file


@pytest.mark.parametrize(
    ("flags", "expected"), [(["avx2"], torch.float32), (["avx2", "avx512_bf16"], torch.bfloat16), ([], torch.float32)]
)
def test_default_dtype_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: torch.dtype
) -> None:
    monkeypatch.setattr(environment, "instruction_sets", lambda: flags)
    assert environment.default_dtype(torch.device("cpu")) == expected
    assert environment.default_dtype(torch.device("cuda")) == torch.bfloat16


def test_wrong_backend_variable_is_one_line() -> None:
    environment = os.environ | {"MRA_BACKEND": "nonsense"}
    command = [sys.executable, "-m", "mra_model.cli", "doctor"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert result.stderr.startswith("error: MRA_BACKEND='nonsense'")
    assert "Traceback" not in result.stderr
