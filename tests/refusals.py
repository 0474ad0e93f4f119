"""What tests of failing conversions share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import GOLDEN, Tensors, arch_of, read_checkpoint, store_bin, write_checkpoint

from mra_model.convert import ConversionError, convert

ARCH = arch_of(GOLDEN[0])


def refuse(match: str, src: Path, arch: Path | None = ARCH, **options: Any) -> None:
    """Converts `src` to `out` beside it, expects a ConversionError, and that nothing was written or removed."""
    before = sorted(src.parent.iterdir())
    with pytest.raises(ConversionError, match=match):
        convert(src, src.parent / "out", arch=arch, **options)
    assert sorted(src.parent.iterdir()) == before


def source(folder: Path, store: Callable[[Path, Tensors], None] | None = None, **changes: Any) -> Path:
    """The golden checkpoint with changes to its config, in `folder`/source."""
    config, tensors = read_checkpoint(GOLDEN[0])
    return write_checkpoint(folder / "source", config | changes, tensors, store)


def source_of_tensors(folder: Path, change: Callable[[Tensors], object]) -> Path:
    """The golden checkpoint after `change` of its tensors, in `folder`/source."""
    config, tensors = read_checkpoint(GOLDEN[0])
    change(tensors)
    return write_checkpoint(folder / "source", config, tensors, store_bin)
