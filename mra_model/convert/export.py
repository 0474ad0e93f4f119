"""From the transformers format back to the authors' key names and config."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig

from mra_model.configuration_mra import MraVisionConfig
from mra_model.convert import keys
from mra_model.convert.check import check_sizes
from mra_model.convert.folder import (
    PlannedTensor,
    check_destination,
    check_room,
    new_folder,
    plan_shards,
    write_shards,
)
from mra_model.convert.original_config import arch_of, is_released_size, original_config
from mra_model.convert.report import ConversionError, ConversionReport, some
from mra_model.convert.sizes import naming
from mra_model.convert.source import SENTENCEPIECE
from mra_model.convert.weights import StoredTensor, open_weights, read_json, write_json
from mra_model.memory import build_empty


def export_model(src: Path, dst: Path, report: Callable[[str], None]) -> ConversionReport:
    """Writes a model in the transformers format back in the authors' names, layouts and config.

    Args:
        src: a folder that `mra convert` or `save_pretrained` wrote.
        dst: a folder that does not exist or is empty.
        report: called with a line of progress.

    Returns:
        What was done; under `missing` what the authors' loader reads and no model in the transformers format has.

    Raises:
        ConversionError: not such a folder, or a model that the authors' code cannot run; nothing was written.
    """
    check_destination(dst)
    config = _load_config(src / "config.json")
    result = ConversionReport()
    planned = _plan(src, config, result)
    shards = plan_shards(planned)
    check_room(dst, shards)
    pad = _pads(src, result)
    vision = config.vision_config
    if not is_released_size(vision):
        result.warnings.append("no released tower has these sizes: the authors' code cannot build them; see arch.json")
    with new_folder(dst) as folder:
        write_shards(folder, shards, report)
        write_json(folder / "config.json", original_config(config, pad=pad, dtype=planned[0].dtype))
        if not is_released_size(vision):
            write_json(folder / "arch.json", arch_of(vision))
        if (src / SENTENCEPIECE).is_file():
            shutil.copyfile(src / SENTENCEPIECE, folder / SENTENCEPIECE)
        else:
            result.warnings.append(f"{src} has no {SENTENCEPIECE}, which the authors' code reads: add the original one")
    return result


def _load_config(file: Path) -> LlavaConfig:
    fields = read_json(file)
    vision = fields.get("vision_config")
    if not isinstance(vision, dict) or vision.get("model_type") != MraVisionConfig.model_type:
        raise ConversionError(
            f"{file}: vision_config is not a {MraVisionConfig.model_type!r}; only what `mra convert` wrote is exported"
        )
    with naming(file):
        config = LlavaConfig.from_dict(fields)
    vocabulary = config.text_config.vocab_size
    if config.image_token_index != vocabulary - 1:
        raise ConversionError(
            f"{file}: image_token_index is {config.image_token_index}, but must be the last of {vocabulary} rows"
        )
    size = config.vision_config.low_resolution_size
    if size is not None:
        raise ConversionError(f"{file}: low_resolution_size is {size}, which the authors' code does not know; unset it")
    return config


def _plan(src: Path, config: LlavaConfig, result: ConversionReport) -> list[PlannedTensor]:
    """Every parameter under its name and in its layout in the authors' code.

    Raises:
        ConversionError: unknown or missing keys, wrong shapes, or a config that asks for other sizes.
    """
    planned: dict[str, PlannedTensor] = {}
    ours: dict[str, tuple[int, ...]] = {}
    for saved, stored in open_weights(src).items():
        key = keys.module_key(saved)
        renamed = keys.to_authors(key)
        if renamed is None or stored.dtype is None:
            raise ConversionError(
                f"{stored.file}: {saved} is no floating-point tensor of LLaVA-HR; merge adapters first"
            )
        layout = _without_image_row(renamed.layout) if renamed.key in keys.VOCABULARY else renamed.layout
        with naming(stored.file):
            shape = tuple(layout(torch.empty(stored.shape, device="meta")).shape)
        planned[renamed.key] = PlannedTensor(renamed.key, shape, stored.dtype, _maker(stored, layout))
        ours[key] = stored.shape
        result.renamed[saved] = renamed.key
    _check_complete(src / "config.json", config, planned, ours)
    return [*planned.values(), _class_token(planned, result)]


def _check_complete(
    file: Path, config: LlavaConfig, planned: Mapping[str, PlannedTensor], ours: Mapping[str, tuple[int, ...]]
) -> None:
    shapes = {key: tensor.shape for key, tensor in planned.items()}
    check_sizes(config.text_config, config.text_config.vocab_size - 1, config.vision_config, shapes, (file, file))
    with naming(file):
        expected = {
            key: tuple(value.shape) for key, value in build_empty(config, torch.float32, "meta").state_dict().items()
        }
    wrong = [key for key in expected.keys() | ours.keys() if expected.get(key) != ours.get(key)]
    if wrong:
        raise ConversionError(
            f"{file}: these tensors are missing, unexpected or of another shape: {some(sorted(wrong))}"
        )


def _maker(stored: StoredTensor, layout: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    return lambda: layout(stored.load())


def _without_image_row(layout: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`layout` without the last row, that of `<image>`: [V + 1, C] -> [V, C]."""
    return lambda x: layout(x)[:-1]


def _class_token(planned: Mapping[str, PlannedTensor], result: ConversionReport) -> PlannedTensor:
    """The class token, zero: the authors' code puts it in front of the tokens, and drops it before the first layer."""
    positions = planned[keys.POSITIONS]
    for key in (keys.CLASS_TOKEN, f"{keys.POSITIONS}[0]"):
        result.missing[key] = "zero: the authors' code reads the class token and drops it before the first layer"
    shape = positions.shape[1:]
    return PlannedTensor(keys.CLASS_TOKEN, shape, positions.dtype, lambda: torch.zeros(shape, dtype=positions.dtype))


def _pads(src: Path, result: ConversionReport) -> bool:
    """Whether the processor in `src` pads pictures to a square."""
    file = src / "processor_config.json"
    if file.is_file():
        image_processor: Any = read_json(file).get("image_processor")
        if isinstance(image_processor, dict) and isinstance(image_processor.get("do_pad"), bool):
            return image_processor["do_pad"]
    result.warnings.append(f"{src} has no processor that says whether pictures are padded: assuming they are")
    return True
