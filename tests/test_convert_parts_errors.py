"""Stage-1 files and LoRA folders that must be refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import DATA, GOLDEN, Tensors, read_checkpoint, write_checkpoint
from refusals import ARCH, refuse
from safetensors.torch import load_file, save_file

from mra_model.convert import convert, keys


class TestStage1Errors:
    """Parts that are absent, of another kind, or do not fit."""

    @pytest.fixture
    def projector(self, tmp_path: Path) -> Path:
        _, tensors = read_checkpoint(GOLDEN[2])
        trained = {key: value for key, value in tensors.items() if "mm_projector" in key or "align_stages" in key}
        torch.save(trained, tmp_path / "mm_projector.bin")
        return tmp_path / "mm_projector.bin"

    def test_frozen_parts_are_not_given(self, projector: Path) -> None:
        refuse("mm_projector.bin holds only .* give the frozen parts with --llm, --clip, --convnext", projector)

    def test_not_a_projector(self, tmp_path: Path) -> None:
        torch.save({"lm_head.weight": torch.ones(2)}, tmp_path / "x.bin")
        whole = DATA / GOLDEN[0]
        refuse(
            "its keys must contain mm_projector or align_stages", tmp_path / "x.bin", **self.given(tmp_path, llm=whole)
        )

    def given(self, tmp_path: Path, **changes: Path) -> dict[str, Path]:
        """Frozen parts that are good, but for `changes`."""
        config, tensors = read_checkpoint(GOLDEN[2])
        language = {key: value for key, value in tensors.items() if "vision" not in key and "projector" not in key}
        write_checkpoint(tmp_path / "llm", config | {"model_type": "llama"}, language)
        vision = json.loads(ARCH.read_text())["vision"]
        clip = {key.removeprefix(keys.LOW): value for key, value in tensors.items() if key.startswith(keys.LOW)}
        write_checkpoint(tmp_path / "clip", vision, clip)
        save_file(
            {key.removeprefix(keys.HIGH): value for key, value in tensors.items() if key.startswith(keys.HIGH)},
            tmp_path / "convnext.safetensors",
        )
        parts = {"llm": tmp_path / "llm", "clip": tmp_path / "clip", "convnext": tmp_path / "convnext.safetensors"}
        return parts | changes

    def test_another_language_model(self, projector: Path, tmp_path: Path) -> None:
        given = self.given(tmp_path)
        (tmp_path / "llm" / "config.json").write_text(json.dumps({"model_type": "mistral"}))
        refuse("model_type is 'mistral'; the language model is a 'llama'", projector, **given)

    @pytest.mark.parametrize(
        ("part", "other", "says"),
        [
            ("clip", "llm", r"llm has no embeddings\.\* keys"),
            ("convnext", "llm", r"llm has no stem\.\* keys"),
            ("llm", "nowhere", "nowhere.*does not exist"),
            ("clip", "nowhere", "nowhere does not exist"),
            ("convnext", "nowhere", "nowhere does not exist"),
        ],
    )
    def test_wrong_part(self, part: str, other: str, says: str, projector: Path, tmp_path: Path) -> None:
        refuse(says, projector, **self.given(tmp_path, **{part: tmp_path / other}))

    def test_parts_that_do_not_fit(self, projector: Path, tmp_path: Path) -> None:
        torch.save(torch.load(projector) | {"model.mm_projector.0.weight": torch.ones(48, 64)}, projector)
        refuse(r"mm_projector\.0\.weight has shape .48, 64.", projector, **self.given(tmp_path))


class TestLoraErrors:
    """Adapters that cannot be merged."""

    @pytest.fixture
    def lora(self, tmp_path: Path) -> Path:
        config, _ = read_checkpoint(GOLDEN[0])
        folder = tmp_path / "lora"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        self.set_lora(folder)
        torch.save({"base_model.model.model.mm_projector.2.bias": torch.ones(48)}, folder / "non_lora_trainables.bin")
        weight = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
        save_file(
            {weight.format("A"): torch.ones(4, 48), weight.format("B"): torch.ones(48, 4)},
            folder / "adapter_model.safetensors",
        )
        return folder

    @staticmethod
    def set_lora(folder: Path, **changes: object) -> None:
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": "vicuna"}
        (folder / "adapter_config.json").write_text(json.dumps(settings | changes))

    def test_lora_is_good_without_changes(self, lora: Path, tmp_path: Path) -> None:
        """The other tests of this fixture fail for the reason that they name."""
        convert(lora, tmp_path / "out", llm=DATA / GOLDEN[0], arch=ARCH)

    def test_lora_without_base(self, lora: Path) -> None:
        refuse("give its base 'vicuna' with --llm", lora)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"use_dora": True}, "use_dora is True; only plain LoRA"),
            ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
            ({"bias": "all"}, "bias is 'all'"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
            ({"r": 0}, "r is 0"),
            ({"r": "4"}, "r is '4'"),
            ({"lora_alpha": None}, "lora_alpha None"),
            ({"r": 8}, "of r 8 do not fit"),
        ],
    )
    def test_lora_that_is_no_plain_one(self, changes: dict[str, object], says: str, lora: Path) -> None:
        self.set_lora(lora, **changes)
        refuse(says, lora, llm=DATA / GOLDEN[0])

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda t: t.popitem(), "has no .*lora_B"),
            (lambda t: t.update({"base_model.model.model.layers.7.x.lora_A.weight": torch.ones(4, 48)}), "lora_B|base"),
            (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), "no plain LoRA: .*lm_head"),
            (lambda t: t.update({key: torch.ones(4, 50) for key in t if "lora_A" in key}), "do not fit"),
            (lambda t: t.update({key: torch.ones(4) for key in t if "lora_A" in key}), "do not fit"),
        ],
    )
    def test_adapter_weights(self, change: Callable[[Tensors], object], says: str, lora: Path) -> None:
        tensors = dict(sorted(load_file(lora / "adapter_model.safetensors").items()))
        change(tensors)
        save_file(tensors, lora / "adapter_model.safetensors")
        refuse(says, lora, llm=DATA / GOLDEN[0])

    def test_lora_without_weights(self, lora: Path) -> None:
        (lora / "adapter_model.safetensors").unlink()
        refuse("no adapter_model.safetensors or adapter_model.bin", lora, llm=DATA / GOLDEN[0])

    def test_lora_without_the_other_trainables(self, lora: Path) -> None:
        (lora / "non_lora_trainables.bin").unlink()
        refuse("non_lora_trainables.bin does not exist", lora, llm=DATA / GOLDEN[0])
