"""Reading weight files lazily: safetensors or `.bin`, whole or in shards. Nothing is loaded until it is asked for."""

import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mra_model.convert.report import ConversionError, some

WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

# `.bin` files of other projects keep their tensors under one of these.
NESTED = ("state_dict", "model")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a weight file.

    Attributes:
        file: where it lies.
        shape: as stored.
        dtype: None where it is no floating-point type that this package reads (integers, 8-bit floats).
        load: reads it.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    load: Callable[[], Tensor]


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds a whole checkpoint under one of the names that transformers writes."""
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConversionError: the file is absent, no JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist; a checkpoint folder needs it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not readable as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds a {type(value).__name__}, not a JSON object; download it again")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def open_weights(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a weight file, or of a folder with `model.safetensors` or `pytorch_model.bin`, whole or sharded.

    Raises:
        ConversionError: no such file, a missing shard, a truncated or hostile file.
    """
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        raise ConversionError(f"{path} does not exist")
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return _open_shards(path / name) if name.endswith(".index.json") else _open_file(path / name)
    raise ConversionError(f"{path} holds no weights; expected one of {', '.join(WEIGHT_FILES)}")


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConversionError(f"{index} has no weight_map of file names; download it again")
    names = sorted(set(weight_map.values()))
    foreign = [name for name in names if Path(name).name != name or name in ("", ".", "..")]
    if foreign:
        raise ConversionError(f"{index} names files outside its folder ({some(foreign)}); shards must lie beside it")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise ConversionError(f"{index.parent} lacks {len(absent)} shard(s): {some(absent)}; download them")
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        tensors |= _open_file(index.parent / name)
    lost = [key for key in weight_map if key not in tensors]
    if lost:
        raise ConversionError(f"{index} lists keys that no shard holds: {some(lost)}; download the shards again")
    return tensors


def _open_file(path: Path) -> dict[str, StoredTensor]:
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        file = safe_open(path, "pt")
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is no readable safetensors file ({error}); download it again") from error
    except RuntimeError as error:
        raise ConversionError(f"{path} cannot be mapped ({error}); a machine with more memory is needed") from error

    return {
        key: StoredTensor(path, tuple(part.get_shape()), FLOATS.get(part.get_dtype()), partial(file.get_tensor, key))
        for key, part in slices.items()
    }


def _open_pickle(path: Path) -> dict[str, StoredTensor]:
    """A file written by `torch.save`. Read with `weights_only`, so that it can hold tensors and no code."""
    try:
        # Files of the old format are no zip archives and cannot be mapped: they are read whole.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(
            f"{path} is no readable file of tensors ({reason}); it may be truncated, or hold code, which is never run"
        ) from error
    content = next((content[key] for key in NESTED if _is_nested(content, key)), content)
    if not isinstance(content, dict) or not content:
        raise ConversionError(f"{path} holds a {type(content).__name__} and no tensors by name")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ConversionError(f"{path} holds values that are no tensors: {some(others)}; is it a training checkpoint?")
    return {key: _stored(path, key, value) for key, value in tensors.items()}


def _is_nested(content: object, key: str) -> bool:
    return isinstance(content, dict) and isinstance(content.get(key), dict)


def _stored(path: Path, key: str, tensor: Tensor) -> StoredTensor:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ConversionError(f"{path}: {key} is a {tensor.layout} tensor; only plain, unquantized ones are read")
    # A few bytes with stride 0 can claim any shape.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ConversionError(f"{path}: {key} claims shape {tuple(tensor.shape)}, which the file does not hold")
    dtype = tensor.dtype if tensor.dtype in FLOATS.values() else None
    return StoredTensor(path, tuple(tensor.shape), dtype, lambda: tensor.detach())
