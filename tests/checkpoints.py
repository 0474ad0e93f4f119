"""Golden checkpoints in the authors' format, rewritten in the ways that people have them on disk."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DATA = Path(__file__).parent / "data"
GOLDEN = ("llava_hr_tiny_384", "llava_hr_tiny_1024", "llava_hr_tiny_384_noadapter")

Tensors = dict[str, Tensor]


def read_checkpoint(name: str) -> tuple[dict[str, Any], Tensors]:
    """The authors' config and tensors of a golden checkpoint."""
    return json.loads((DATA / name / "config.json").read_text()), load_file(DATA / name / "model.safetensors")


def write_checkpoint(
    folder: Path, config: dict[str, Any], tensors: Tensors, store: Callable[[Path, Tensors], None] | None = None
) -> Path:
    """An original checkpoint; `store` writes the weights, by default one safetensors file. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (store or store_safetensors)(folder, tensors)
    return folder


def arch_of(name: str) -> Path:
    """The `--arch` file of a golden checkpoint."""
    return DATA / name / "arch.json"


def with_gamma(tensors: Tensors) -> Tensors:
    """The same with ConvNeXt's layer scale by timm's name, which transformers changes when it saves."""
    layer_scale = re.compile(r"(.*stages\.\d+\.blocks\.\d+\.)weight")
    return {layer_scale.sub(r"\1gamma", key): value for key, value in tensors.items()}


def with_vocabulary(config: dict[str, Any], tensors: Tensors, rows: int) -> tuple[dict[str, Any], Tensors]:
    """The same model with more rows in its vocabulary, random ones."""
    grown = dict(tensors)
    generator = torch.Generator().manual_seed(0)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        added = torch.randn(rows - len(tensors[key]), tensors[key].shape[1], generator=generator)
        grown[key] = torch.cat([tensors[key], added])
    return config | {"vocab_size": rows}, grown


def add_tokenizer(folder: Path) -> Path:
    """Puts the original tokenizer of 640 pieces into `folder`. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(DATA / "llava_data" / name, folder / name)
    return folder


def store_safetensors(folder: Path, tensors: Tensors) -> None:
    """One safetensors file."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")


def store_safetensors_shards(folder: Path, tensors: Tensors) -> None:
    """Three safetensors files and their index."""
    _store_shards(folder, tensors, "model-{}-of-3.safetensors", "model.safetensors.index.json", save_file)


def store_bin(folder: Path, tensors: Tensors) -> None:
    """One `.bin` file."""
    torch.save(tensors, folder / "pytorch_model.bin")


def store_old_bin(folder: Path, tensors: Tensors) -> None:
    """One `.bin` file in the format before PyTorch 1.6, which is no zip archive."""
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def store_bin_shards(folder: Path, tensors: Tensors) -> None:
    """Three `.bin` files and their index."""
    _store_shards(folder, tensors, "pytorch_model-{}-of-3.bin", "pytorch_model.bin.index.json", torch.save)


def _store_shards(
    folder: Path, tensors: Tensors, template: str, index: str, store: Callable[[Tensors, Path], object]
) -> None:
    weight_map = {}
    for number, part in enumerate(_thirds(tensors), start=1):
        name = template.format(number)
        store(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _thirds(tensors: Tensors) -> Iterator[Tensors]:
    names = list(tensors)
    for start in range(3):
        yield {name: tensors[name] for name in names[start::3]}


def assert_same_tensors(folder: Path, expected: Path) -> None:
    """Both folders hold the same weights, bit by bit."""
    ours, theirs = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
