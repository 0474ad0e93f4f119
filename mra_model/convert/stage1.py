"""Checkpoints that come in parts: the first training stage's `mm_projector.bin`, and LoRA folders.

Both need the frozen language model; where the towers were frozen too, also CLIP and the ConvNeXt.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from transformers import LlamaConfig

from mra_model.configuration_mra import convnext_xxlarge
from mra_model.convert import keys
from mra_model.convert.check import convnext_sizes
from mra_model.convert.report import ConversionError, ConversionReport, some
from mra_model.convert.sizes import (
    Towers,
    clip_config,
    convnext_config,
    text_config,
    towers_from_arch,
)
from mra_model.convert.source import (
    PictureSettings,
    Source,
    assemble,
    check_original,
    find_tokenizer,
    picture_settings,
)
from mra_model.convert.weights import StoredTensor, open_weights, read_json

# The side of the authors' first stage.
STAGE1_SIDE = 384

# `mm_projector.bin` holds every parameter whose name contains one of the two words, whatever stands in front.
_PROJECTOR = re.compile(r"(?:.*\.)?(mm_projector\..+)")
_ALIGN = re.compile(r"(?:.*\.)?(align_stages(?:_latent)?\..+)")

_CLIP_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
_CONVNEXT_PARTS = ("stem.", "stages.", "head.", "norm_pre.")


def stage1_source(
    projector: Path, llm: Path | None, clip: Path | None, convnext: Path | None, arch: Path | None
) -> Source:
    """A first stage's result and the frozen parts it was trained with.

    Args:
        projector: `mm_projector.bin`; the `config.json` beside it, if any, gives side and padding.
        llm: folder of a Llama in the transformers format.
        clip: folder of a CLIPModel or CLIPVisionModel in the transformers format.
        convnext: a ConvNeXt of timm or open_clip.
        arch: overrides the sizes that CLIP's config and the ConvNeXt's keys imply.

    Raises:
        ConversionError: a part is not given, absent or of another kind.
    """
    absent = [f"--{name}" for name, path in (("llm", llm), ("clip", clip), ("convnext", convnext)) if path is None]
    if llm is None or clip is None or convnext is None:
        raise ConversionError(
            f"{projector} holds only the trained projector and merge; give the frozen parts with {', '.join(absent)}"
        )
    report = ConversionReport()
    text, tensors = language_model(llm)
    tensors |= clip_tensors(clip, report)
    tensors |= convnext_tensors(convnext, report)
    tensors |= projector_tensors(projector)
    towers = towers_from_arch(arch) if arch else _towers(clip, convnext, tensors)
    pictures, picture_file = _pictures(projector, report)
    files = (llm / "config.json", picture_file)
    return assemble(tensors, text, towers, pictures, files, find_tokenizer(llm), report)


def language_model(folder: Path) -> tuple[LlamaConfig, dict[str, StoredTensor]]:
    """Config and tensors of a Llama in the transformers format, or of a whole original LLaVA-HR checkpoint.

    Raises:
        ConversionError: another kind of model.
    """
    file = folder / "config.json"
    config = read_json(file)
    if config.get("model_type") != "llama":
        if "mm_vision_tower" not in config:
            raise ConversionError(
                f"{file}: model_type is {config.get('model_type')!r}; the language model is a 'llama'"
            )
        check_original(config, file)
    return text_config(config, file), open_weights(folder)


def clip_tensors(folder: Path, report: ConversionReport) -> dict[str, StoredTensor]:
    """The vision half of a CLIP in the transformers format, by the authors' keys.

    Raises:
        ConversionError: the folder holds no CLIP vision model.
    """
    stored = open_weights(folder)
    # transformers 5 saves a CLIPVisionModel without the prefix.
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in stored) else ""
    return _take(stored, prefix, _CLIP_PARTS, keys.LOW, f"{folder}: not CLIP's vision half", report)


def convnext_tensors(path: Path, report: ConversionReport) -> dict[str, StoredTensor]:
    """A ConvNeXt of timm (`stem.0.weight`) or open_clip (`visual.trunk.stem.0.weight`), by the authors' keys.

    Raises:
        ConversionError: the file holds no such ConvNeXt.
    """
    stored = open_weights(path)
    prefix = "visual.trunk." if any(key.startswith("visual.trunk.") for key in stored) else ""
    return _take(stored, prefix, _CONVNEXT_PARTS, keys.HIGH, f"{path}: not the ConvNeXt trunk", report)


def _take(
    stored: Mapping[str, StoredTensor],
    prefix: str,
    parts: tuple[str, ...],
    renamed_prefix: str,
    why_not: str,
    report: ConversionReport,
) -> dict[str, StoredTensor]:
    """The tensors under `prefix` that belong to `parts`, under another prefix; the others go to the report."""
    taken = {}
    for key, tensor in stored.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and name.startswith(parts):
            taken[renamed_prefix + name] = tensor
        else:
            report.ignored[key] = why_not
    if not any(name.startswith(renamed_prefix + parts[0]) for name in taken):
        raise ConversionError(f"{why_not.split(':')[0]} has no {parts[0]}* keys, but {some(list(stored), 3)}")
    return taken


def projector_tensors(file: Path) -> dict[str, StoredTensor]:
    """Projector, merge and, where they were trained, MR-Adapters of `mm_projector.bin`, by the authors' full keys.

    Raises:
        ConversionError: the file holds something else.
    """
    tensors, others = {}, []
    for key, tensor in open_weights(file).items():
        projector, align = _PROJECTOR.fullmatch(key), _ALIGN.fullmatch(key)
        if projector:
            tensors["model." + projector[1]] = tensor
        elif align:
            tensors[keys.TOWER + align[1]] = tensor
        else:
            others.append(key)
    if others or not tensors:
        raise ConversionError(
            f"{file} is no stage-1 file: its keys must contain mm_projector or align_stages, but it has "
            f"{some(others) if others else 'none'}"
        )
    return tensors


def _towers(clip: Path, convnext: Path, tensors: Mapping[str, StoredTensor]) -> Towers:
    config = read_json(clip / "config.json")
    low = clip_config(config.get("vision_config", config), clip / "config.json")
    depths, dims = convnext_sizes({key: tensor.shape for key, tensor in tensors.items()})
    eps = convnext_eps(depths, dims)
    return Towers(
        low, convnext_config({"depths": depths, "dims": dims, "norm_eps": eps}, convnext), clip / "config.json"
    )


def convnext_eps(depths: list[int], dims: list[int]) -> float:
    """The eps of the LayerNorms, which a ConvNeXt's keys do not show: of all sizes, only XXLarge has another."""
    xxlarge = convnext_xxlarge()
    is_xxlarge = (depths, dims) == (list(xxlarge.depths), list(xxlarge.hidden_sizes))
    return xxlarge.layer_norm_eps if is_xxlarge else 1e-6


def _pictures(projector: Path, report: ConversionReport) -> tuple[PictureSettings, Path]:
    file = projector.parent / "config.json"
    if file.is_file():
        config = read_json(file)
        check_original(config, file)
        return picture_settings(config, file, report), file
    report.warnings.append(
        f"no config.json beside {projector}: assuming the first stage's {STAGE1_SIDE} pixels, pictures not padded"
    )
    return PictureSettings(STAGE1_SIDE, pad=False), projector
