"""A checkpoint to convert: tensors by the authors' names, not read yet, and the configs that go with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from mra_model.configuration_mra import MraVisionConfig
from mra_model.convert import keys
from mra_model.convert.check import check_sizes
from mra_model.convert.report import ConversionError, ConversionReport
from mra_model.convert.sizes import (
    Towers,
    text_config,
    towers_from_arch,
    towers_from_names,
    vision_config,
)
from mra_model.convert.weights import StoredTensor, open_weights, read_json

SENTENCEPIECE = "tokenizer.model"
TOKENIZER_FILES = ("tokenizer.json", SENTENCEPIECE)


@dataclass
class Source:
    """A whole model in the authors' names.

    Attributes:
        tensors: by the authors' key.
        text: the language model, without the row for `<image>`.
        text_file: the config it was read from, for messages.
        vision: the tower.
        pad: whether pictures are padded to a square.
        tokenizer: the folder of the tokenizer, None where there is none.
        report: what is known so far.
    """

    tensors: dict[str, StoredTensor]
    text: LlamaConfig
    text_file: Path
    vision: MraVisionConfig
    pad: bool
    tokenizer: Path | None
    report: ConversionReport


@dataclass(frozen=True)
class PictureSettings:
    """What an original config says of pictures: their side in pixels, and whether they are padded to a square."""

    side: object
    pad: bool


def original_source(folder: Path, arch: Path | None) -> Source:
    """A whole original checkpoint: a folder with the authors' `config.json` and weights.

    Raises:
        ConversionError: not an original LLaVA-HR checkpoint, or one that disagrees with its config.
    """
    file = folder / "config.json"
    config = read_json(file)
    check_original(config, file)
    report = ConversionReport()
    pictures = picture_settings(config, file, report)
    towers = towers_from_arch(arch) if arch else towers_from_names(config, file)
    source = assemble(
        open_weights(folder), text_config(config, file), towers, pictures, (file, file), find_tokenizer(folder), report
    )
    if config.get("freeze_vision") is source.vision.adapters:
        report.warnings.append(
            f"{file} has freeze_vision {config['freeze_vision']}, under which the authors' code "
            f"{'ignores' if source.vision.adapters else 'expects'} MR-Adapters, but the weights "
            f"{'hold them' if source.vision.adapters else 'have none'}: the model follows the weights"
        )
    return source


def assemble(
    tensors: dict[str, StoredTensor],
    text: LlamaConfig,
    towers: Towers,
    pictures: PictureSettings,
    files: tuple[Path, Path],
    tokenizer: Path | None,
    report: ConversionReport,
) -> Source:
    """Joins the parts of a source and checks them against each other.

    Args:
        tensors: by the authors' key.
        text: the language model.
        towers: sizes of the two pathways.
        pictures: side and padding.
        files: the configs that the language model and the picture settings come from, for messages.
        tokenizer: the folder of the tokenizer, if any.
        report: what is known so far.

    Raises:
        ConversionError: an invalid side, or a config that asks for other sizes than the weights have.
    """
    text_file, picture_file = files
    adapters = any(key.startswith(keys.ADAPTERS) for key in tensors)
    vision = vision_config(towers, pictures.side, adapters, picture_file)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    check_sizes(text, text.vocab_size, vision, shapes, (text_file, towers.file))
    if not adapters:
        report.missing[keys.ADAPTERS + "*"] = "a checkpoint of the first training stage has no MR-Adapters"
    return Source(tensors, text, text_file, vision, pictures.pad, tokenizer, report)


def check_original(config: Mapping[str, Any], file: Path) -> None:
    """Raises unless `config` is the authors' flat config of a dual-resolution model.

    Released LLaVA-HR configs and the transformers format both say `model_type: "llava"`; the nested `vision_config`
    tells them apart.

    Raises:
        ConversionError: says what the folder holds instead.
    """
    nested = config.get("vision_config")
    if isinstance(nested, dict) and nested.get("model_type") == MraVisionConfig.model_type:
        raise ConversionError(f"{file} is in the transformers format already: load it as it is, or `mra export` it")
    if nested is not None or "mm_vision_tower" not in config:
        raise ConversionError(
            f"{file} is no original LLaVA-HR config (model_type {config.get('model_type')!r}, "
            f"{'with a nested vision_config' if nested is not None else 'no mm_vision_tower'})"
        )
    if not config.get("is_multipath_encoder"):
        raise ConversionError(f"{file}: is_multipath_encoder is not set: a LLaVA with one tower, not LLaVA-HR")
    if config.get("lavin_enable"):
        raise ConversionError(f"{file}: lavin_enable is set; LaVIN adapters are not supported")


def picture_settings(config: Mapping[str, Any], file: Path, report: ConversionReport) -> PictureSettings:
    """What the authors' config says of pictures.

    Raises:
        ConversionError: a projector or a way of cutting pictures that LLaVA-HR's released models do not use.
    """
    projector = config.get("mm_projector_type")
    if projector != "mlp2x_gelu":
        raise ConversionError(f"{file}: mm_projector_type is {projector!r}; only 'mlp2x_gelu' is supported")
    ratio, merge = config.get("image_aspect_ratio"), config.get("mm_patch_merge_type") or "flat"
    if ratio not in (None, "pad", "square") or merge != "flat":
        raise ConversionError(
            f"{file}: image_aspect_ratio {ratio!r} with mm_patch_merge_type {merge!r} is not supported; "
            f"released models use 'pad' or 'square' with 'flat'"
        )
    if config.get("mm_use_im_start_end"):
        report.warnings.append(
            f"{file} has mm_use_im_start_end: write <im_start><image><im_end> in prompts, the chat template does not"
        )
    return PictureSettings(config.get("input_image_size"), pad=ratio == "pad")


def find_tokenizer(folder: Path) -> Path | None:
    """`folder` where it holds a tokenizer."""
    return folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else None
