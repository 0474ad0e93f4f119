"""Export to the authors' names, and the sizes of the released models."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import DATA, GOLDEN, arch_of, assert_same_tensors, read_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlamaConfig

from mra_model import PRESETS, MraVisionConfig
from mra_model.configuration_mra import convnext_xxlarge
from mra_model.convert import convert, export, keys
from mra_model.convert.original_config import is_released_size, original_config
from mra_model.convert.sizes import text_config, towers_from_names
from mra_model.memory import build_empty
from mra_model.presets import llava_config


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a golden checkpoint in the transformers format, converted once."""
    root = tmp_path_factory.mktemp("converted")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            convert(DATA / name, root / name, arch=arch_of(name))
        return root / name

    return folder


class TestExport:
    """Back to the authors' names."""

    @pytest.mark.parametrize("name", GOLDEN)
    def test_bit_equal(self, name: str, tmp_path: Path, converted: Callable[[str], Path]) -> None:
        report = export(converted(name), tmp_path / "back")
        config, original = read_checkpoint(name)
        exported = load_file(tmp_path / "back" / "model.safetensors")
        used = {key for key in original if keys.why_unused(key) is None}
        assert set(exported) == used | {keys.CLASS_TOKEN}
        for key in used - {keys.POSITIONS}:
            assert torch.equal(exported[key], original[key]), key
        assert torch.equal(exported[keys.POSITIONS][1:], original[keys.POSITIONS][1:])
        assert exported[keys.POSITIONS][0].abs().max() == exported[keys.CLASS_TOKEN].abs().max() == 0
        assert set(report.missing) == {keys.CLASS_TOKEN, f"{keys.POSITIONS}[0]"}
        written = json.loads((tmp_path / "back" / "config.json").read_text())
        same = set(config) & set(written) - {"image_aspect_ratio"}
        assert {key: written[key] for key in same} == {key: config[key] for key in same}
        assert same >= {
            "model_type",
            "vocab_size",
            "input_image_size",
            "freeze_vision",
            "mm_vision_tower",
            "rope_scaling",
        }

    @pytest.mark.parametrize("name", GOLDEN)
    def test_converts_again(self, name: str, tmp_path: Path, converted: Callable[[str], Path]) -> None:
        export(converted(name), tmp_path / "back")
        convert(tmp_path / "back", tmp_path / "again", arch=tmp_path / "back" / "arch.json")
        assert_same_tensors(tmp_path / "again", converted(name))
        for file in ("config.json", "generation_config.json"):
            assert (tmp_path / "again" / file).read_text() == (converted(name) / file).read_text()

    def test_of_a_saved_model(self, tmp_path: Path, converted: Callable[[str], Path]) -> None:
        """`save_pretrained` writes other prefixes than the module names."""
        model = AutoModelForImageTextToText.from_pretrained(converted(GOLDEN[0]))
        model.save_pretrained(tmp_path / "saved")
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
        assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
        export(tmp_path / "saved", tmp_path / "back")
        export(converted(GOLDEN[0]), tmp_path / "direct")
        assert_same_tensors(tmp_path / "back", tmp_path / "direct")

    def test_scaled_rope_comes_back(self, tmp_path: Path) -> None:
        fields = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5, "vocab_size": 129}
        text = text_config(fields, tmp_path)
        written = original_config(llava_config(MraVisionConfig(), text), pad=True, dtype=torch.float16)
        assert (written["rope_scaling"], written["rope_theta"]) == (fields["rope_scaling"], 5e5)
        assert text_config(written, tmp_path).rope_parameters == text.rope_parameters


class TestReleasedSizes:
    """The two released models, without their weights."""

    NAMES = (
        ("convnext_large_mlp.clip_laion2b_ft_320", [192, 384, 768, 1536], [3, 3, 27, 3], 1e-6),
        ("convnext_xxlarge.clip_laion2b_soup", [384, 768, 1536, 3072], [3, 4, 30, 3], 1e-5),
    )

    @pytest.mark.parametrize(("name", "dims", "depths", "eps"), NAMES)
    @pytest.mark.parametrize("prefix", ["", "./checkpoints/"])
    def test_tower_names(self, prefix: str, name: str, dims: list[int], depths: list[int], eps: float) -> None:
        config = {"mm_vision_tower": prefix + "openai/clip-vit-large-patch14-336", "vision_tower_slow": prefix + name}
        towers = towers_from_names(config, Path("config.json"))
        high, low = towers.high, towers.low
        assert (list(high.hidden_sizes), list(high.depths), high.layer_norm_eps) == (dims, depths, eps)
        assert (low.hidden_size, low.num_hidden_layers, low.num_attention_heads) == (1024, 24, 16)
        assert (low.intermediate_size, low.image_size, low.patch_size) == (4096, 336, 14)

    @pytest.mark.parametrize("preset", ["llava-hr-7b", "llava-hr-x-13b"])
    def test_every_parameter_has_a_name_and_a_layout_both_ways(self, preset: str) -> None:
        for name, value in build_empty(PRESETS[preset], torch.float32, "meta").state_dict().items():
            authors = keys.to_authors(name)
            assert authors is not None, name
            back = keys.to_ours(authors.key)
            assert back is not None
            assert back.key == name
            assert back.layout(authors.layout(value)).shape == value.shape

    def test_names_of_the_towers_in_exports(self) -> None:
        text = LlamaConfig(vocab_size=129)
        for vision, (name, *_) in zip(
            (MraVisionConfig(), MraVisionConfig(high_config=convnext_xxlarge())), self.NAMES, strict=True
        ):
            assert is_released_size(vision)
            assert (
                original_config(llava_config(vision, text), pad=True, dtype=torch.float16)["vision_tower_slow"] == name
            )
