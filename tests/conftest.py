"""Fixtures that several test files share: a tiny model of the real structure, and the folder of golden data."""

import os
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mra_model import MraVisionConfig, MraVisionModel, build_model
from mra_model.presets import llava_config

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter

    triton_interpreter.install()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of golden data and test pictures."""
    return Path(__file__).parent / "data"


def make_tiny_config(image_size: int = 128, adapters: bool = True, **vision: object) -> LlavaConfig:
    """A LLaVA-HR small enough for a test: ViT grid 4 (56 pixels), 16 image tokens at 128, vocabulary 640 + 1."""
    tower = MraVisionConfig(
        image_size=image_size,
        adapters=adapters,
        low_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
        high_config={"hidden_sizes": [8, 16, 24, 48], "depths": [1, 1, 2, 1], "layer_norm_eps": 1e-6},
        **vision,
    )
    text = LlamaConfig(
        vocab_size=641,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return llava_config(tower, text)


@pytest.fixture
def tiny_config() -> LlavaConfig:
    """A fresh config of a tiny LLaVA-HR; a test may change it."""
    return make_tiny_config()


@pytest.fixture
def tiny_model(tiny_config: LlavaConfig) -> LlavaForConditionalGeneration:
    """A tiny LLaVA-HR with every parameter random, in float32 and evaluation mode; a test may change it."""
    return build_model(tiny_config, seed=0)


@pytest.fixture
def tower(tiny_model: LlavaForConditionalGeneration) -> MraVisionModel:
    """The vision tower of `tiny_model`."""
    return tiny_model.model.vision_tower
