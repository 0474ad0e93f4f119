"""Checkpoints of the LLaVA-HR authors to the transformers format, and back.

The authors' words are slow for the high-resolution pathway and fast for the low-resolution one; `keys.py` is the table.
"""

from collections.abc import Callable
from pathlib import Path

from mra_model.convert.build import DTYPES, write_model
from mra_model.convert.export import export_model
from mra_model.convert.folder import check_destination
from mra_model.convert.lora import CONFIG, lora_source
from mra_model.convert.report import ConversionError, ConversionReport
from mra_model.convert.source import Source, original_source
from mra_model.convert.stage1 import stage1_source
from mra_model.convert.weights import WEIGHT_FILES, has_weights

PROJECTOR = "mm_projector.bin"


def _silent(line: str) -> None:
    """Progress that nobody wants to see."""


def convert(
    src: Path,
    dst: Path,
    *,
    arch: Path | None = None,
    tokenizer: Path | None = None,
    dtype: str | None = None,
    llm: Path | None = None,
    clip: Path | None = None,
    convnext: Path | None = None,
    report: Callable[[str], None] = _silent,
) -> ConversionReport:
    """Converts an original LLaVA-HR checkpoint to the transformers format, with processor and tokenizer.

    `dst` appears whole or not at all. Tensors are streamed, so that a conversion needs the memory of one shard.

    Args:
        src: a folder with the authors' `config.json` and weights (safetensors or `.bin`, whole or sharded); the first
            stage's `mm_projector.bin` or its folder, which need `llm`, `clip` and `convnext`; or a LoRA folder, which
            needs `llm` and, where training froze the towers, `clip` and `convnext`.
        dst: a folder that does not exist or is empty.
        arch: JSON with the towers' sizes, for other sizes than the tower names in `config.json` imply.
        tokenizer: folder of the tokenizer, where `src` has none.
        dtype: of the result, one of `DTYPES`; None keeps the language model's.
        llm: folder of a Llama in the transformers format.
        clip: folder of a CLIPModel or CLIPVisionModel in the transformers format.
        convnext: file of a ConvNeXt of timm or open_clip.
        report: called with each line of progress.

    Returns:
        What was done with every key.

    Raises:
        ConversionError: names the file, the value and the remedy; nothing was written.
    """
    check_destination(dst)
    source = _open(src, arch, llm, clip, convnext)
    return write_model(source, dst, tokenizer, dtype, report)


def _open(src: Path, arch: Path | None, llm: Path | None, clip: Path | None, convnext: Path | None) -> Source:
    if src.is_file():
        return stage1_source(src, llm, clip, convnext, arch)
    if not src.is_dir():
        raise ConversionError(f"{src} does not exist; give a checkpoint's folder or an {PROJECTOR}")
    if (src / CONFIG).is_file():
        return lora_source(src, llm, clip, convnext, arch)
    if has_weights(src):
        given = [f"--{name}" for name, path in (("llm", llm), ("clip", clip), ("convnext", convnext)) if path]
        if given:
            raise ConversionError(f"{src} is a whole checkpoint, so {', '.join(given)} would have no effect; leave out")
        return original_source(src, arch)
    if (src / PROJECTOR).is_file():
        return stage1_source(src / PROJECTOR, llm, clip, convnext, arch)
    raise ConversionError(f"{src} holds no weights: expected one of {', '.join((*WEIGHT_FILES, PROJECTOR, CONFIG))}")


def export(src: Path, dst: Path, *, report: Callable[[str], None] = _silent) -> ConversionReport:
    """Writes a converted, and perhaps further trained, model back in the authors' names and config.

    Args:
        src: a folder that `convert` or `save_pretrained` wrote.
        dst: a folder that does not exist or is empty.
        report: called with each line of progress.

    Returns:
        What was done with every key; what the authors' code reads and `src` lacks is zero, and listed as missing.

    Raises:
        ConversionError: names the file, the value and the remedy; nothing was written.
    """
    return export_model(src, dst, report)


__all__ = ["DTYPES", "ConversionError", "ConversionReport", "convert", "export"]
