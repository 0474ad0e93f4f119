"""The authors' flat `config.json`, and the `arch.json` of sizes that no tower name implies."""

from typing import Any

import torch
from transformers import LlavaConfig

from mra_model.configuration_mra import MraVisionConfig, clip_large, convnext_large, convnext_xxlarge
from mra_model.convert.sizes import CLIP_FIELDS, TEXT_FIELDS

LOW_NAME = "openai/clip-vit-large-patch14-336"
HIGH_NAMES = (
    ("convnext_large_mlp.clip_laion2b_ft_320", convnext_large),
    ("convnext_xxlarge.clip_laion2b_soup", convnext_xxlarge),
)


def original_config(config: LlavaConfig, *, pad: bool, dtype: torch.dtype) -> dict[str, Any]:
    """What the authors' code expects in `config.json`.

    Args:
        config: in the transformers format, its vocabulary counting the row of `<image>`.
        pad: whether pictures are padded to a square.
        dtype: of the weights.
    """
    vision = config.vision_config
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        **_text_fields(config),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "tie_word_embeddings": False,
        "mm_vision_tower": LOW_NAME,
        "vision_tower_slow": _high_name(vision) or HIGH_NAMES[0][0],
        "is_multipath_encoder": True,
        "input_image_size": vision.image_size,
        "image_aspect_ratio": "pad" if pad else "square",
        # The authors' code builds MR-Adapters exactly where the towers are trained.
        "freeze_vision": not vision.adapters,
        "tune_mm_mlp_adapter": False,
        "delay_load": True,
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "use_mm_proj": True,
        # Later versions of their code fetch a pretrained ConvNeXt unless this contains "llava".
        "model_name_or_path": "llava-hr",
    }


def is_released_size(vision: MraVisionConfig) -> bool:
    """Whether tower names imply the sizes of `vision`."""
    return _high_name(vision) is not None and _low_fields(vision) == _fields(clip_large())


def arch_of(vision: MraVisionConfig) -> dict[str, Any]:
    """The sizes of `vision`, for `--arch`."""
    high = vision.high_config
    return {
        "vision": _low_fields(vision),
        "convnext": {"depths": list(high.depths), "dims": list(high.hidden_sizes), "norm_eps": high.layer_norm_eps},
    }


def _text_fields(config: LlavaConfig) -> dict[str, Any]:
    text = config.text_config
    fields = {name: getattr(text, name) for name in TEXT_FIELDS if hasattr(text, name)}
    rope = dict(fields.pop("rope_parameters", None) or {})
    fields["rope_theta"] = rope.pop("rope_theta", 10000.0)
    kind = rope.pop("rope_type", "default")
    fields["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    fields["vocab_size"] = text.vocab_size - 1
    return fields


def _high_name(vision: MraVisionConfig) -> str | None:
    high = vision.high_config
    for name, build in HIGH_NAMES:
        named = build()
        if (list(high.hidden_sizes), list(high.depths), high.layer_norm_eps) == (
            list(named.hidden_sizes),
            list(named.depths),
            named.layer_norm_eps,
        ):
            return name
    return None


def _low_fields(vision: MraVisionConfig) -> dict[str, Any]:
    return _fields(vision.low_config)


def _fields(low: Any) -> dict[str, Any]:
    return {name: getattr(low, name) for name in CLIP_FIELDS}
