"""Conversion of checkpoints that come in parts: `mm_projector.bin` with its frozen models, and LoRA folders."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import DATA, GOLDEN, Tensors, add_tokenizer, arch_of, read_checkpoint, with_gamma, write_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mra_model.convert import ConversionError, ConversionReport, convert, keys
from mra_model.convert.stage1 import convnext_eps

STAGE1 = GOLDEN[2]
FULL = GOLDEN[0]


def under(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose key starts with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def llama(name: str) -> LlamaForCausalLM:
    """The language model of a golden checkpoint."""
    config, tensors = read_checkpoint(name)
    fields = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    )
    model = LlamaForCausalLM(
        LlamaConfig(**{field: config[field] for field in fields}, max_position_embeddings=4096, pad_token_id=0)
    )
    own = {key: tensors[key] for key in model.state_dict()}
    model.load_state_dict(own)
    return model


def clip(name: str) -> CLIPVisionModel:
    """The CLIP of a golden checkpoint."""
    _, tensors = read_checkpoint(name)
    fields = json.loads(arch_of(name).read_text())["vision"]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    model = CLIPVisionModel(CLIPVisionConfig(**{size: fields[size] for size in sizes}))
    own = under(tensors, keys.LOW)
    if any(key.startswith("vision_model.") for key in model.state_dict()):
        own = {"vision_model." + key: value for key, value in own.items()}
    model.load_state_dict(own)
    return model


def convnext(name: str) -> Tensors:
    """The ConvNeXt of a golden checkpoint by timm's names, its layer scale called gamma."""
    _, tensors = read_checkpoint(name)
    return with_gamma(under(tensors, keys.HIGH))


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder with `llm/`, `clip/`, `convnext.safetensors` and `stage1/mm_projector.bin` of a stage-1 checkpoint."""
    llama(STAGE1).save_pretrained(tmp_path / "llm")
    clip(STAGE1).save_pretrained(tmp_path / "clip")
    save_file(convnext(STAGE1), tmp_path / "convnext.safetensors")
    config, tensors = read_checkpoint(STAGE1)
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "config.json").write_text(json.dumps(config))
    trained = {key: value for key, value in tensors.items() if "mm_projector" in key or "align_stages" in key}
    torch.save(trained, tmp_path / "stage1" / "mm_projector.bin")
    return tmp_path


def convert_parts(parts: Path, src: str = "stage1/mm_projector.bin", **changes: Path) -> ConversionReport:
    given = {"llm": parts / "llm", "clip": parts / "clip", "convnext": parts / "convnext.safetensors"} | changes
    return convert(parts / src, parts / "out", **given)


def assert_equals_whole(out: Path, name: str, tmp_path: Path) -> None:
    """`out` is what the conversion of the whole checkpoint gives, bit by bit."""
    convert(DATA / name, tmp_path / "whole", arch=arch_of(name))
    ours, theirs = load_file(out / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    model, whole = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (out, tmp_path / "whole"))
    assert model.config.vision_config.to_dict() == whole.config.vision_config.to_dict()


class TestStage1:
    """`mm_projector.bin` with the models that stayed frozen."""

    @pytest.mark.parametrize("src", ["stage1/mm_projector.bin", "stage1"])
    def test_equals_the_whole_checkpoint(self, src: str, parts: Path) -> None:
        report = convert_parts(parts, src)
        assert_equals_whole(parts / "out", STAGE1, parts)
        assert any("head" in why for why in report.ignored.values())

    def test_wrapped_key_names(self, parts: Path) -> None:
        """DeepSpeed and PEFT put their own words in front of a name."""
        file = parts / "stage1" / "mm_projector.bin"
        wrapped = {"module.base_model." + key: value for key, value in torch.load(file).items()}
        torch.save(wrapped, file)
        convert_parts(parts)
        assert_equals_whole(parts / "out", STAGE1, parts)

    def test_with_trained_adapters(self, parts: Path) -> None:
        llama(FULL).save_pretrained(parts / "llm")
        clip(FULL).save_pretrained(parts / "clip")
        save_file(convnext(FULL), parts / "convnext.safetensors")
        config, tensors = read_checkpoint(FULL)
        trained = {key: value for key, value in tensors.items() if "mm_projector" in key or "align_stages" in key}
        torch.save(trained, parts / "stage1" / "mm_projector.bin")
        (parts / "stage1" / "config.json").write_text(json.dumps(config))
        convert_parts(parts)
        assert_equals_whole(parts / "out", FULL, parts)

    @pytest.mark.parametrize("prefix", ["", "vision_model."])
    def test_whole_clip(self, prefix: str, parts: Path) -> None:
        """A CLIPModel's folder has a text half beside the vision half, and nests its vision config."""
        file = parts / "clip" / "model.safetensors"
        stored = {key.removeprefix("vision_model."): value for key, value in load_file(file).items()}
        stored = {prefix + key: value for key, value in stored.items()} | {"logit_scale": torch.tensor(4.6)}
        if prefix:
            stored["text_model.final_layer_norm.weight"] = torch.ones(8)
        save_file(stored, file)
        config = json.loads((parts / "clip" / "config.json").read_text())
        (parts / "clip" / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": config}))
        report = convert_parts(parts)
        assert "vision half" in report.ignored["logit_scale"]
        assert_equals_whole(parts / "out", STAGE1, parts)

    def test_open_clip_file(self, parts: Path) -> None:
        trunk = {"visual.trunk." + key: value for key, value in convnext(STAGE1).items() if not key.startswith("head")}
        others = {"visual.head.proj.weight": torch.ones(4, 40), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}
        torch.save(trunk | others, parts / "open_clip_pytorch_model.bin")
        report = convert_parts(parts, convnext=parts / "open_clip_pytorch_model.bin")
        assert set(others) <= set(report.ignored)
        assert_equals_whole(parts / "out", STAGE1, parts)

    def test_nested_state_dict(self, parts: Path) -> None:
        torch.save({"epoch": 3, "state_dict": convnext(STAGE1)}, parts / "training.pt")
        convert_parts(parts, convnext=parts / "training.pt")
        assert_equals_whole(parts / "out", STAGE1, parts)

    def test_without_config(self, parts: Path) -> None:
        (parts / "stage1" / "config.json").unlink()
        report = convert_parts(parts)
        assert any("384" in warning and "not padded" in warning for warning in report.warnings)
        assert_equals_whole(parts / "out", STAGE1, parts)

    def test_the_language_models_tokenizer_is_taken(self, parts: Path) -> None:
        """Here it does not fit, which shows that it was read."""
        add_tokenizer(parts / "llm")
        with pytest.raises(ConversionError, match=r"llm: the tokenizer has 640 tokens, .* 128"):
            convert_parts(parts)

    def test_eps_by_size(self) -> None:
        assert convnext_eps([3, 4, 30, 3], [384, 768, 1536, 3072]) == 1e-5
        assert convnext_eps([3, 3, 27, 3], [192, 384, 768, 1536]) == 1e-6


class TestLora:
    """A LoRA folder of the authors' training, against PEFT's own merge."""

    @pytest.fixture
    def lora(self, tmp_path: Path) -> Callable[..., Path]:
        """Makes `llm/`, and `lora/` with a random adapter and everything else of the full golden checkpoint."""

        def make(**options: object) -> Path:
            llama(FULL).save_pretrained(tmp_path / "llm")
            settings = LoraConfig(
                r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options
            )
            model = get_peft_model(llama(FULL), settings)
            generator = torch.Generator().manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
            model.save_pretrained(tmp_path / "lora")
            config, tensors = read_checkpoint(FULL)
            (tmp_path / "lora" / "config.json").write_text(json.dumps(config))
            trained = {
                "base_model.model." + key: value
                for key, value in tensors.items()
                if "mm_projector" in key or "tower" in key
            }
            torch.save(trained, tmp_path / "lora" / "non_lora_trainables.bin")
            merged = model.merge_and_unload().state_dict()
            write_checkpoint(tmp_path / "expected", config, tensors | merged)
            convert(tmp_path / "expected", tmp_path / "whole", arch=arch_of(FULL))
            return tmp_path

        return make

    @pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
    def test_equals_pefts_merge(self, options: dict[str, object], lora: Callable[..., Path]) -> None:
        folder = lora(**options)
        report = convert(folder / "lora", folder / "out", llm=folder / "llm", arch=arch_of(FULL))
        assert sum(why.startswith("merged into") for why in report.ignored.values()) == 8
        ours = load_file(folder / "out" / "model.safetensors")
        theirs = load_file(folder / "whole" / "model.safetensors")
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-6, atol=1e-6)

    def test_merges_into_an_original_checkpoint(self, lora: Callable[..., Path]) -> None:
        """The base may be a whole LLaVA-HR, whose towers training froze."""
        folder = lora()
        trained = torch.load(folder / "lora" / "non_lora_trainables.bin")
        few = {key: value for key, value in trained.items() if "mm_projector" in key}
        torch.save(few, folder / "lora" / "non_lora_trainables.bin")
        convert(folder / "lora", folder / "out", llm=DATA / FULL, arch=arch_of(FULL))
        ours = load_file(folder / "out" / "model.safetensors")
        for key, value in load_file(folder / "whole" / "model.safetensors").items():
            torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-6)

    def test_frozen_towers_come_from_their_own_files(self, lora: Callable[..., Path]) -> None:
        folder = lora()
        trained = torch.load(folder / "lora" / "non_lora_trainables.bin")
        own = {key: value for key, value in trained.items() if "vision_tower.vision_tower" not in key}
        torch.save(own, folder / "lora" / "non_lora_trainables.bin")
        clip(FULL).save_pretrained(folder / "clip")
        save_file(convnext(FULL), folder / "convnext.safetensors")
        parts = {"llm": folder / "llm", "clip": folder / "clip", "convnext": folder / "convnext.safetensors"}
        convert(folder / "lora", folder / "out", arch=arch_of(FULL), **parts)
        ours = load_file(folder / "out" / "model.safetensors")
        for key, value in load_file(folder / "whole" / "model.safetensors").items():
            torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-6)
