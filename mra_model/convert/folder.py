"""Writing a checkpoint folder: whole or not at all, tensors streamed shard by shard."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mra_model.convert.report import ConversionError
from mra_model.convert.weights import write_json
from mra_model.memory import available_memory

# Peak memory of a conversion is about one shard.
SHARD_BYTES = 2 * 10**9

# Configs, tokenizer and file headers, generously.
SMALL_FILES_BYTES = 32 * 2**20


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: its name, shape and dtype, and how to make it when its shard's turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_shards(tensors: list[PlannedTensor]) -> list[list[PlannedTensor]]:
    """`tensors` in order, cut into shards of at most `SHARD_BYTES`; a larger tensor has a shard of its own."""
    shards: list[list[PlannedTensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def check_destination(dst: Path) -> None:
    """Raises ConversionError where `dst` exists already and is not an empty folder."""
    if dst.is_symlink() or (dst.exists() and (not dst.is_dir() or any(dst.iterdir()))):
        raise ConversionError(f"{dst} exists already; choose another folder, or remove it first")


def check_room(dst: Path, shards: list[list[PlannedTensor]]) -> None:
    """Raises unless the disk has room for all shards and the memory for the largest one.

    Raises:
        ConversionError: says how much is needed and how much there is.
    """
    sizes = [sum(tensor.nbytes for tensor in shard) for shard in shards]
    parent = next(folder for folder in dst.absolute().parents if folder.exists())
    needed, free = sum(sizes) + SMALL_FILES_BYTES, shutil.disk_usage(parent).free
    if needed > free:
        raise ConversionError(
            f"{dst} needs {_gib(needed)}, but the disk of {parent} has {_gib(free)} free; "
            f"free some, or choose another disk or a narrower --dtype"
        )
    # A shard is held once in the source's dtype and once in its own.
    needed, free = 2 * max(sizes), available_memory("cpu")
    if needed > free:
        raise ConversionError(
            f"the largest part of this checkpoint needs {_gib(needed)} of memory, but {_gib(free)} is available; "
            f"convert on a larger machine, or with a narrower --dtype"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


@contextmanager
def new_folder(dst: Path) -> Iterator[Path]:
    """A folder beside `dst` that becomes `dst` when the block ends well, and vanishes when it does not.

    Raises:
        ConversionError: the disk refuses to be written.
    """
    partial = dst.absolute().parent / f".{dst.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        _sync_tree(partial)
        if dst.exists():
            dst.rmdir()
        partial.rename(dst)
        _sync(dst.absolute().parent)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{dst} could not be written ({error}); nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_shards(folder: Path, shards: list[list[PlannedTensor]], report: Callable[[str], None]) -> None:
    """Writes `model.safetensors`, or several shards and their index, into `folder`."""
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        report(f"writing {name} ({number} of {len(shards)})")
        save_file(_make(shard), folder / name, metadata={"format": "pt"})
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _make(shard: list[PlannedTensor]) -> dict[str, Tensor]:
    made = {}
    for planned in shard:
        value = planned.make()
        # A copy always, because safetensors refuses tensors that share memory with others.
        tensor = value.to(planned.dtype, copy=True, memory_format=torch.contiguous_format)
        if tensor.dtype == torch.float16 != value.dtype and not torch.equal(tensor.isfinite(), value.isfinite()):
            raise ConversionError(f"{planned.name} has values too large for float16; use --dtype bfloat16 or float32")
        made[planned.name] = tensor
    return made


def _sync_tree(folder: Path) -> None:
    """Forces every file of `folder` to the disk, so that the rename never outlives what it names."""
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        # Windows has no handle of a folder that could be flushed.
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
