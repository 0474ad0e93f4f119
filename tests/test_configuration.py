"""The tower's config: which sides are valid, what sizes follow from them, and what it refuses."""

import pytest
from transformers import AutoConfig, CLIPVisionConfig, ConvNextConfig, LlavaConfig

from mra_model import PRESETS, MraVisionConfig, preset_config
from mra_model.configuration_mra import convnext_xxlarge

RELEASED_SIZES = {384: (24, 576, 16), 768: (24, 576, 32), 1024: (32, 1024, 32), 1536: (48, 2304, 32)}


@pytest.mark.parametrize("side", RELEASED_SIZES)
def test_sizes_follow_the_authors_rule(side: int) -> None:
    config = MraVisionConfig(image_size=side)
    assert (config.grid, config.num_image_tokens, config.patch_size) == RELEASED_SIZES[side]
    assert config.high_grid == side // 32
    assert config.low_resolution == max(side // 32 * 14, 336)
    assert (config.hidden_size, config.num_hidden_layers) == (1024, 24)


def test_valid_sides_are_those_of_the_released_models() -> None:
    config = MraVisionConfig()
    valid = [side for side in range(1, 900) if config.is_valid_side(side)]
    assert valid == [32, 64, 96, 128, 192, 256, 384, 768, 800, 832, 864, 896]


@pytest.mark.parametrize(
    ("side", "nearest"),
    [(0, [32]), (-5, [32]), (31, [32]), (100, [96, 128]), (640, [384, 768]), (767, [384, 768]), (1000, [992, 1024])],
)
def test_an_invalid_side_names_the_nearest_valid_ones(side: int, nearest: list[int]) -> None:
    assert MraVisionConfig().nearest_sides(side) == nearest
    with pytest.raises(ValueError, match=f"{side} x {side} .* {' and '.join(map(str, nearest))}$"):
        MraVisionConfig(image_size=side)


def test_low_resolution_size_fixes_the_grid() -> None:
    config = MraVisionConfig(image_size=1536, low_resolution_size=336)
    assert (config.grid, config.num_image_tokens, config.high_grid, config.patch_size) == (24, 576, 48, 64)
    assert [side for side in range(32, 2400, 32) if config.is_valid_side(side)] == [
        *(32, 64, 96, 128, 192, 256, 384, 768, 1536, 2304)
    ]
    assert config.nearest_sides(1024) == [768, 1536]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"low_resolution_size": 340}, "340.*multiple of 14.*336 and 350"),
        ({"low_resolution_size": 5}, "5.*14 and 14"),
        ({"image_size": 1024, "low_resolution_size": 336}, "768 and 1536"),
        ({"low_config": {"num_hidden_layers": 6, "patch_size": 14, "image_size": 336}}, "6.*multiple of 4"),
        ({"low_config": {"num_hidden_layers": 0, "patch_size": 14, "image_size": 336}}, "0.*multiple of 4"),
        ({"low_config": {"num_hidden_layers": 4, "patch_size": 14, "image_size": 330}}, "330.*14"),
        ({"high_config": {"depths": [1, 1, 1], "hidden_sizes": [8, 8, 8]}}, "four stages"),
        ({"high_config": {"patch_size": 2}}, "stem of 4"),
    ],
)
def test_impossible_sizes_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MraVisionConfig(**values)


def test_sub_configs_may_be_dicts_or_configs() -> None:
    low = {"hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    from_dict = MraVisionConfig(image_size=128, low_config=low, high_config=convnext_xxlarge().to_dict())
    from_config = MraVisionConfig(image_size=128, low_config=CLIPVisionConfig(**low), high_config=convnext_xxlarge())
    assert isinstance(from_dict.low_config, CLIPVisionConfig)
    assert isinstance(from_dict.high_config, ConvNextConfig)
    assert from_dict.to_dict() == from_config.to_dict()
    assert from_dict.high_config.layer_norm_eps == 1e-5


def test_a_saved_config_is_read_back(tmp_path, tiny_config: LlavaConfig) -> None:
    tiny_config.vision_config.adapters = False
    tiny_config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, LlavaConfig)
    assert isinstance(loaded.vision_config, MraVisionConfig)
    assert loaded.vision_config.to_dict() == tiny_config.vision_config.to_dict()
    assert loaded.text_config.to_dict() == tiny_config.text_config.to_dict()
    assert (loaded.image_token_index, loaded.image_seq_length) == (640, 16)


def test_presets_follow_the_released_models() -> None:
    sizes = {name: config.text_config.hidden_size for name, config in PRESETS.items()}
    assert sizes == {"llava-hr-7b": 4096, "llava-hr-x-13b": 5120, "llava-hr-cpu": 256}
    for config in PRESETS.values():
        assert config.image_token_index == config.text_config.vocab_size - 1
        assert config.image_seq_length == 1024
        assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-1, "full")
        assert config.text_config.max_position_embeddings == 4096
        assert config.text_config.rope_parameters["rope_theta"] == 10000.0
    assert PRESETS["llava-hr-x-13b"].vision_config.high_config.hidden_sizes[-1] == 3072


def test_preset_config_is_a_copy_at_the_asked_side() -> None:
    config = preset_config("llava-hr-7b", image_size=768)
    assert (config.vision_config.image_size, config.image_seq_length) == (768, 576)
    assert PRESETS["llava-hr-7b"].vision_config.image_size == 1024
    with pytest.raises(ValueError, match="384 and 768"):
        preset_config("llava-hr-7b", image_size=700)
    with pytest.raises(ValueError, match="llava-hr-7b, llava-hr-x-13b, llava-hr-cpu"):
        preset_config("llava-hr-8b")
