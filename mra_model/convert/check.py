"""Whether a config and the weights beside it belong together."""

import re
from collections.abc import Mapping
from pathlib import Path

from transformers import LlamaConfig

from mra_model.configuration_mra import MraVisionConfig
from mra_model.convert import keys
from mra_model.convert.report import ConversionError

# By the authors' key.
Shapes = Mapping[str, tuple[int, ...]]


def check_sizes(
    text: LlamaConfig, rows: int, vision: MraVisionConfig, shapes: Shapes, files: tuple[Path, Path]
) -> None:
    """Raises unless the configs ask for the layers and widths that the weights hold.

    A config can ask for any size; after this check it asks for no more than the files hold, so that building its
    model on the meta device is safe.

    Args:
        text: the language model.
        rows: of its embedding in `shapes`.
        vision: the tower.
        shapes: by the authors' key.
        files: the configs of the language model and of the towers, for messages.

    Raises:
        ConversionError: names the config file, its value and the weights' value.
    """
    text_file, tower_file = files
    low, high = vision.low_config, vision.high_config
    embedding = _matrix(shapes, keys.EMBEDDING)
    gate = _matrix(shapes, "model.layers.0.mlp.gate_proj.weight")
    fc1 = _matrix(shapes, keys.LOW + "encoder.layers.0.mlp.fc1.weight")
    depths, dims = convnext_sizes(shapes)
    pairs: list[tuple[Path, str, object, object]] = [
        (text_file, "vocab_size", rows, embedding[0]),
        (text_file, "hidden_size", text.hidden_size, embedding[1]),
        (text_file, "intermediate_size", text.intermediate_size, gate[0]),
        (text_file, "num_hidden_layers", text.num_hidden_layers, _count(shapes, "model.layers.")),
        (tower_file, "CLIP's hidden_size", low.hidden_size, fc1[1]),
        (tower_file, "CLIP's intermediate_size", low.intermediate_size, fc1[0]),
        (tower_file, "CLIP's num_hidden_layers", low.num_hidden_layers, _count(shapes, keys.LOW + "encoder.layers.")),
        (tower_file, "the ConvNeXt's depths", list(high.depths), depths),
        (tower_file, "the ConvNeXt's dims", list(high.hidden_sizes), dims),
    ]
    for file, field, asked, held in pairs:
        if asked != held:
            raise ConversionError(
                f"{file}: {field} by the config or the tower names: {asked}, by the weights: {held}; "
                f"correct the config, or give the towers' sizes with --arch"
            )


def convnext_sizes(shapes: Shapes) -> tuple[list[int], list[int]]:
    """Depths and channels of the ConvNeXt's stages."""
    prefixes = [f"{keys.HIGH}stages.{stage}.blocks." for stage in range(_count(shapes, keys.HIGH + "stages."))]
    depths = [_count(shapes, prefix) for prefix in prefixes]
    return depths, [_matrix(shapes, prefix + "0.conv_dw.weight")[0] for prefix in prefixes]


def _count(shapes: Shapes, prefix: str) -> int:
    """How many different numbers follow `prefix`."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for match in map(pattern.match, shapes) if match})


def _matrix(shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise ConversionError(f"the weights lack {key}; is this a whole LLaVA-HR checkpoint?")
    if len(shapes[key]) < 2:
        raise ConversionError(f"{key} has shape {list(shapes[key])}, but must have two dimensions or more")
    return shapes[key]
