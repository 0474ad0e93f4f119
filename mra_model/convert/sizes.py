"""The configs of a model in the transformers format, from what the authors wrote into theirs."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, ConvNextConfig, LlamaConfig

from mra_model.configuration_mra import MraVisionConfig, clip_large, convnext_large, convnext_xxlarge
from mra_model.convert.report import ConversionError
from mra_model.convert.weights import read_json

LOW_TOWERS = {"clip-vit-large-patch14-336": clip_large}
HIGH_TOWERS = {"convnext_large": convnext_large, "convnext_xxlarge": convnext_xxlarge}

# The fields of a flat Llama config that change what the language model computes.
TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)

CLIP_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


@dataclass(frozen=True)
class Towers:
    """The sizes of the two pathways, and the file that they come from, for messages."""

    low: CLIPVisionConfig
    high: ConvNextConfig
    file: Path


def towers_from_names(config: Mapping[str, Any], file: Path) -> Towers:
    """The sizes that the tower names of an original config imply.

    Raises:
        ConversionError: an unknown tower.
    """
    return Towers(
        low=_named_tower(config, "mm_vision_tower", LOW_TOWERS, file),
        high=_named_tower(config, "vision_tower_slow", HIGH_TOWERS, file),
        file=file,
    )


def _named_tower(config: Mapping[str, Any], field: str, known: Mapping[str, Callable[[], Any]], file: Path) -> Any:
    name = config.get(field)
    for fragment, build in known.items():
        if isinstance(name, str) and fragment in name:
            return build()
    raise ConversionError(
        f"{file}: {field} is {name!r}, whose sizes are unknown (known: {', '.join(known)}); give them with --arch"
    )


def towers_from_arch(file: Path) -> Towers:
    """The sizes in an `--arch` file: `{"vision": a CLIP config, "convnext": {"depths", "dims", "norm_eps"}}`.

    Raises:
        ConversionError: an unreadable file or a missing or wrong value.
    """
    arch = read_json(file)
    low, high = _section(arch, "vision", file), _section(arch, "convnext", file)
    for field in ("depths", "dims"):
        if not isinstance(high.get(field), list):
            raise ConversionError(f"{file}: convnext.{field} is {high.get(field)!r}, but must be a list of four sizes")
    return Towers(low=clip_config(low, file), high=convnext_config(high, file), file=file)


def _section(arch: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
    section = arch.get(name)
    if not isinstance(section, dict):
        raise ConversionError(f"{file} has no {name!r} object; an arch file holds 'vision' and 'convnext'")
    return section


def clip_config(fields: Mapping[str, Any], file: Path) -> CLIPVisionConfig:
    """The low-resolution pathway of a CLIP vision config's `fields`.

    Raises:
        ConversionError: a wrong value, or a resolution that the authors' code does not use.
    """
    with naming(file):
        config = CLIPVisionConfig(**{key: fields[key] for key in CLIP_FIELDS if key in fields})
    if (config.image_size, config.patch_size) != (336, 14):
        raise ConversionError(
            f"{file}: a CLIP of image_size {config.image_size} and patch_size {config.patch_size}; "
            f"LLaVA-HR uses one of 336 and 14"
        )
    return config


def convnext_config(fields: Mapping[str, Any], file: Path) -> ConvNextConfig:
    """The high-resolution pathway of `fields`: `depths`, `dims` and `norm_eps`."""
    with naming(file):
        return ConvNextConfig(
            hidden_sizes=fields["dims"], depths=fields["depths"], layer_norm_eps=fields.get("norm_eps", 1e-6)
        )


def text_config(fields: Mapping[str, Any], file: Path) -> LlamaConfig:
    """The language model of a flat Llama config's `fields`, without the row for `<image>`.

    Raises:
        ConversionError: a wrong value, tied embeddings.
    """
    if fields.get("tie_word_embeddings"):
        raise ConversionError(f"{file}: tie_word_embeddings is true; LLaVA-HR has an lm_head of its own")
    # A copy, because LlamaConfig completes the dict of the rotary embedding in place.
    given = copy.deepcopy({key: fields[key] for key in TEXT_FIELDS if fields.get(key) is not None})
    with naming(file):
        return LlamaConfig(**given, tie_word_embeddings=False)


def vision_config(towers: Towers, side: object, adapters: bool, file: Path) -> MraVisionConfig:
    """The tower for pictures of `side` pixels.

    Raises:
        ConversionError: an invalid side, named with the nearest valid ones.
    """
    if not isinstance(side, int) or isinstance(side, bool):
        raise ConversionError(f"{file}: input_image_size is {side!r}, but must be a number of pixels such as 1024")
    with naming(file):
        return MraVisionConfig(image_size=side, adapters=adapters, low_config=towers.low, high_config=towers.high)


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Turns any complaint about a config's value inside the block into a ConversionError that names `file`."""
    try:
        yield
    except ConversionError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, StrictDataclassError) as error:
        raise ConversionError(f"{file}: {' '.join(str(error).split())}") from error
