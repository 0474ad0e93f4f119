"""Conversions that stop while they write, and folders that cannot be exported: nothing half-written stays."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import DATA, GOLDEN, Tensors, read_checkpoint, store_safetensors_shards, write_checkpoint
from refusals import ARCH, refuse, source
from safetensors.torch import load_file, save_file

from mra_model.convert import ConversionError, convert, export, keys
from mra_model.convert import folder as folder_module


class TestWriting:
    """A destination that is taken, a machine that is too small, and interruptions."""

    def test_destination_is_not_empty(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        refuse("out exists already", source(tmp_path))
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]

    def test_destination_is_a_file_or_link(self, tmp_path: Path) -> None:
        (tmp_path / "kept").mkdir()
        (tmp_path / "out").write_text("mine")
        refuse("out exists already", source(tmp_path))
        (tmp_path / "out").unlink()
        (tmp_path / "out").symlink_to(tmp_path / "kept")
        refuse("out exists already", source(tmp_path))

    def test_empty_destination_is_used(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        convert(source(tmp_path), tmp_path / "out", arch=ARCH)
        assert (tmp_path / "out" / "model.safetensors").is_file()

    def test_too_little_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
        refuse("out needs 0.03 GiB, but the disk of .* has 0.00 GiB free", source(tmp_path))

    def test_too_little_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(folder_module, "available_memory", lambda device: 2**20)
        refuse("needs 0.00 GiB of memory, but 0.00 GiB is available", source(tmp_path))

    def test_a_sparse_file_that_claims_terabytes(self, tmp_path: Path) -> None:
        """Header and config agree on a size that neither disk nor memory has."""
        config, tensors = read_checkpoint(GOLDEN[0])
        rows = 10**10
        for key in keys.VOCABULARY:
            del tensors[key]
        folder = write_checkpoint(tmp_path / "source", config | {"vocab_size": rows}, tensors, store_safetensors_shards)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        write_sparse(folder / "sparse.safetensors", dict.fromkeys(keys.VOCABULARY, (rows, 48)))
        index["weight_map"] |= dict.fromkeys(keys.VOCABULARY, "sparse.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refuse(r"out needs 35\d\d\.\d\d GiB, but the disk of .* free some|sparse\.safetensors cannot be mapped", folder)

    def test_disk_fills_up_while_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(tensors: Tensors, path: Path, **_: object) -> None:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(folder_module, "save_file", full)
        refuse("out could not be written .*No space left.*nothing was left", source(tmp_path))

    def test_interrupted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(tensors: Tensors, path: Path, **_: object) -> None:
            Path(path).write_bytes(b"half of it")
            raise KeyboardInterrupt

        monkeypatch.setattr(folder_module, "save_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source(tmp_path), tmp_path / "out", arch=ARCH)


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of float32 zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


class TestExport:
    """Folders that cannot be exported."""

    @pytest.fixture
    def converted(self, tmp_path: Path) -> Path:
        convert(DATA / GOLDEN[0], tmp_path / "source", arch=ARCH)
        return tmp_path / "source"

    @staticmethod
    def refuse(match: str, src: Path) -> None:
        with pytest.raises(ConversionError, match=match):
            export(src, src.parent / "out")
        assert not [path for path in src.parent.iterdir() if path != src]

    @staticmethod
    def change_config(folder: Path, section: str | None, **changes: object) -> None:
        config = json.loads((folder / "config.json").read_text())
        (config[section] if section else config).update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    @staticmethod
    def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def test_original_checkpoint(self, tmp_path: Path) -> None:
        self.refuse("only what `mra convert` wrote is exported", source(tmp_path))

    def test_absent(self, tmp_path: Path) -> None:
        self.refuse("source.*does not exist", tmp_path / "source")

    @pytest.mark.parametrize(
        ("section", "changes", "says"),
        [
            (None, {"image_token_index": 5}, "image_token_index is 5, but must be the last of 129 rows"),
            ("vision_config", {"low_resolution_size": 336}, "low_resolution_size is 336"),
            ("vision_config", {"image_size": 400}, "nearest valid sides"),
            ("vision_config", {"model_type": "clip_vision_model"}, "only what `mra convert` wrote"),
            ("vision_config", {"adapters": False}, r"missing, unexpected .*adapters\.0"),
            ("text_config", {"num_hidden_layers": 10**9}, "num_hidden_layers .* by the weights: 2"),
        ],
    )
    def test_config(self, section: str | None, changes: dict[str, Any], says: str, converted: Path) -> None:
        self.change_config(converted, section, **changes)
        self.refuse(rf"config\.json.*{says}", converted)

    def test_missing_tensor(self, converted: Path) -> None:
        self.change_tensors(converted, lambda tensors: tensors.pop("model.vision_tower.merge.low_bias"))
        self.refuse(r"missing, unexpected .*merge\.low_bias", converted)

    def test_adapter_of_peft(self, converted: Path) -> None:
        key = "base_model.model.lm_head.lora_A.weight"
        self.change_tensors(converted, lambda tensors: tensors.update({key: torch.ones(2, 2)}))
        self.refuse(f"{key} is no floating-point tensor of LLaVA-HR; merge adapters first", converted)

    def test_destination_is_taken(self, converted: Path) -> None:
        with pytest.raises(ConversionError, match="exists already"):
            export(converted, converted)
