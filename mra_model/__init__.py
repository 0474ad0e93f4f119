"""LLaVA-HR for transformers: importing this package registers the dual-resolution tower with the Auto classes.

The whole model is a stock `LlavaForConditionalGeneration` whose `vision_config` is an `MraVisionConfig`.
"""

from transformers import AutoConfig, AutoModel

from mra_model.configuration_mra import MraVisionConfig
from mra_model.decoding import fast_decode
from mra_model.features import fast_prefill
from mra_model.images import ImageError, load_image
from mra_model.memory import NotEnoughMemory
from mra_model.modeling_mra import MraVisionModel
from mra_model.optimization import optimize
from mra_model.presets import LANGUAGE_MODEL_LORA, PRESETS, build_model, preset_config
from mra_model.processing_mra import build_processor, load_tokenizer

AutoConfig.register(MraVisionConfig.model_type, MraVisionConfig, exist_ok=True)
AutoModel.register(MraVisionConfig, MraVisionModel, exist_ok=True)

__all__ = [
    "LANGUAGE_MODEL_LORA",
    "PRESETS",
    "ImageError",
    "MraVisionConfig",
    "MraVisionModel",
    "NotEnoughMemory",
    "build_model",
    "build_processor",
    "fast_decode",
    "fast_prefill",
    "load_image",
    "load_tokenizer",
    "optimize",
    "preset_config",
]
