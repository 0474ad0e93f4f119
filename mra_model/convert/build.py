"""From a source in the authors' names to a folder in the transformers format."""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaProcessor

from mra_model.convert import keys
from mra_model.convert.folder import PlannedTensor, check_room, new_folder, plan_shards, write_shards
from mra_model.convert.report import ConversionError, ConversionReport, some
from mra_model.convert.sizes import naming
from mra_model.convert.source import SENTENCEPIECE, Source
from mra_model.convert.weights import StoredTensor
from mra_model.environment import DTYPES
from mra_model.memory import build_empty
from mra_model.presets import generation_defaults, llava_config
from mra_model.processing_mra import IMAGE_TOKEN, build_processor, load_tokenizer


def write_model(
    source: Source, dst: Path, tokenizer: Path | None, dtype: str | None, report: Callable[[str], None]
) -> ConversionReport:
    """Writes `source` to `dst` in the transformers format, with a processor where there is a tokenizer.

    Args:
        source: the model by the authors' names.
        dst: a folder that does not exist or is empty.
        tokenizer: folder of the tokenizer; None takes the source's.
        dtype: "float32", "bfloat16", "float16"; None keeps that of the language model's embedding.
        report: called with a line of progress.

    Raises:
        ConversionError: nothing was written.
    """
    target = _target_dtype(source, dtype)
    vocabulary = source.text.vocab_size
    source.text.vocab_size = vocabulary + 1
    source.report.missing[IMAGE_TOKEN] = f"appended as row {vocabulary} of {' and '.join(keys.VOCABULARY)}, zero"
    config = llava_config(source.vision, source.text)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = _name(target)
    processor = _processor(source, tokenizer, vocabulary)
    shards = plan_shards(_plan(source, config, target))
    check_room(dst, shards)
    with new_folder(dst) as folder:
        write_shards(folder, shards, report)
        config.save_pretrained(folder)
        generation_defaults(config).save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
            _keep_sentencepiece(tokenizer or source.tokenizer, folder)
    return source.report


def _target_dtype(source: Source, dtype: str | None) -> torch.dtype:
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype is {dtype!r}; choose from {', '.join(DTYPES)}")
    embedding = source.tensors[keys.EMBEDDING]
    target = DTYPES[dtype] if dtype else embedding.dtype
    if target is None:
        raise ConversionError(
            f"{embedding.file}: {keys.EMBEDDING} is no floating-point tensor; weights must be unquantized"
        )
    return target


def _processor(source: Source, tokenizer: Path | None, vocabulary: int) -> LlavaProcessor | None:
    """The processor around the tokenizer in `tokenizer`, or else in the source; None where there is none.

    Raises:
        ConversionError: an unreadable tokenizer, or one of another vocabulary.
    """
    folder = tokenizer or source.tokenizer
    if folder is None:
        source.report.warnings.append(
            "the source has no tokenizer, so the result has no processor: convert again with --tokenizer to have one"
        )
        return None
    try:
        loaded = load_tokenizer(folder)
    except Exception as error:
        # Tokenizer libraries raise bare exceptions on damaged files.
        raise ConversionError(f"{folder}: the tokenizer is not readable ({' '.join(str(error).split())})") from error
    tokens = loaded.convert_tokens_to_ids(IMAGE_TOKEN)
    if tokens != vocabulary:
        raise ConversionError(
            f"{folder}: the tokenizer has {tokens} tokens, but the weights have rows for {vocabulary}; "
            f"give the checkpoint's own with --tokenizer"
        )
    return build_processor(loaded, source.vision.image_size, grid=source.vision.grid, pad=source.pad)


def _keep_sentencepiece(tokenizer: Path | None, folder: Path) -> None:
    """Copies the original `tokenizer.model`, which only `export` reads."""
    if tokenizer is not None and (tokenizer / SENTENCEPIECE).is_file():
        shutil.copyfile(tokenizer / SENTENCEPIECE, folder / SENTENCEPIECE)


def _plan(source: Source, config: LlavaConfig, dtype: torch.dtype) -> list[PlannedTensor]:
    """Every parameter of the model in its own order, matched with the tensor it comes from.

    Raises:
        ConversionError: unknown or missing keys, or a wrong shape.
    """
    with naming(source.text_file):
        empty = build_empty(config, dtype, "meta")
    expected = {name: tuple(value.shape) for name, value in empty.state_dict().items()}
    found = _match(source, expected)
    missing = [renamed.key for renamed in map(keys.to_authors, expected.keys() - found.keys()) if renamed]
    if missing:
        raise ConversionError(f"the source lacks {len(missing)} tensors: {some(sorted(missing))}; is a shard missing?")
    _note_casts(source.report, found, dtype)
    return [PlannedTensor(name, shape, dtype, found[name].make) for name, shape in expected.items()]


@dataclass(frozen=True)
class _Match:
    """A stored tensor that becomes a parameter, and how."""

    stored: StoredTensor
    layout: Callable[[Tensor], Tensor]

    def make(self) -> Tensor:
        return self.layout(self.stored.load())


def _match(source: Source, expected: Mapping[str, tuple[int, ...]]) -> dict[str, _Match]:
    found: dict[str, _Match] = {}
    unknown = []
    for key, stored in source.tensors.items():
        why = keys.why_unused(key)
        renamed = keys.to_ours(key)
        if why:
            source.report.ignored[key] = why
        elif renamed is None or renamed.key not in expected or renamed.key in found:
            unknown.append(key)
        else:
            layout = _with_image_row(renamed.layout) if key in keys.VOCABULARY else renamed.layout
            _check_tensor(key, stored, layout, expected[renamed.key])
            found[renamed.key] = _Match(stored, layout)
            source.report.renamed[key] = renamed.key
    if unknown:
        raise ConversionError(f"{len(unknown)} keys are not a part of LLaVA-HR: {some(unknown)}")
    source.report.ignored[f"{keys.POSITIONS}[0]"] = "the class token's row"
    return found


def _check_tensor(
    key: str, stored: StoredTensor, layout: Callable[[Tensor], Tensor], expected: tuple[int, ...]
) -> None:
    if stored.dtype is None:
        raise ConversionError(
            f"{stored.file}: {key} is no floating-point tensor; only unquantized weights are converted"
        )
    try:
        shape = tuple(layout(torch.empty(stored.shape, device="meta")).shape)
    except (RuntimeError, IndexError):
        # Too few dimensions for the change of layout.
        shape = None
    if shape != expected:
        raise ConversionError(
            f"{stored.file}: {key} has shape {list(stored.shape)}, which does not fit the config; it should give "
            f"{list(expected)}. Is this the config of these weights? Give the towers' sizes with --arch"
        )


def _with_image_row(layout: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`layout`, then a zero row for `<image>`, whose embedding the picture replaces: [V, C] -> [V + 1, C]."""
    return lambda x: torch.cat([layout(x), layout(x).new_zeros(1, *x.shape[1:])])


def _note_casts(report: ConversionReport, found: Mapping[str, _Match], dtype: torch.dtype) -> None:
    others = Counter(match.stored.dtype for match in found.values() if match.stored.dtype != dtype)
    for other, count in others.items():
        report.warnings.append(f"{count} tensors were {_name(other)} and are now {_name(dtype)}")


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
