"""Presets and random models: sizes, seeds, and the refusal of what does not fit into memory."""

import pytest
import torch
from transformers import LlavaConfig

from mra_model import MraVisionConfig, NotEnoughMemory, build_model, memory, preset_config

# [trunk of ConvNeXt, whole model]. timm counts 197,767,336 and 846,471,016 for the trunks, with final norm and head.
PARAMETERS = {
    "llava-hr-7b": (197_767_336 - 2 * 1536 - 1537 * 1000, 7_280_012_995),
    "llava-hr-x-13b": (846_471_016 - 2 * 3072 - 3073 * 1000, 14_242_645_891),
    "llava-hr-cpu": (197_767_336 - 2 * 1536 - 1537 * 1000, 524_430_275),
}

# transformers counts 303,507,456 for CLIP ViT-L/14 at 336; class token, its position and the last norm are unused.
CLIP_PARAMETERS = 303_507_456 - 4 * 1024


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_on_meta_have_the_released_sizes(name: str) -> None:
    model = build_model(name, device="meta")
    tower = model.model.vision_tower
    trunk, whole = PARAMETERS[name]
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in tower.high.parameters()) == trunk
    assert sum(parameter.numel() for parameter in tower.low.parameters()) == CLIP_PARAMETERS
    assert memory.count_parameters(preset_config(name)) == whole
    epsilons = {module.eps for module in tower.high.modules() if hasattr(module, "eps")}
    assert epsilons == {1e-5 if name == "llava-hr-x-13b" else 1e-6}


def test_equal_seeds_give_equal_weights(tiny_config: LlavaConfig) -> None:
    first, again, other = (build_model(tiny_config, seed=seed).state_dict() for seed in (1, 1, 2))
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert not torch.equal(value, other[name]), name


def test_dtype_only_rounds(tiny_config: LlavaConfig) -> None:
    wide, narrow = (build_model(tiny_config, dtype=dtype).state_dict() for dtype in (torch.float32, torch.bfloat16))
    for name, value in narrow.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, wide[name].bfloat16()), name


def test_every_parameter_is_random(tiny_model) -> None:
    for name, parameter in tiny_model.named_parameters():
        if parameter.numel() > 1:
            assert parameter.std() > 0.01, name
        assert parameter.abs().max() > 1e-3, name
        if name.endswith("layer_scale"):
            assert 0.1 < parameter.mean() < 0.5, name


def test_activations_stay_near_one(tiny_model) -> None:
    words = torch.randint(3, 640, (1, 20), generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert 0.3 < tiny_model.model.vision_tower(pixels).last_hidden_state.std() < 10
        assert 0.1 < tiny_model(words).logits.std() < 10


def test_the_image_token_is_no_class(tiny_model) -> None:
    words = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        logits = tiny_model(words).logits
    assert not logits[..., 640].any()
    assert tiny_model.generation_config.suppress_tokens == [640]


def test_the_callers_config_and_random_state_stay(tiny_config: LlavaConfig) -> None:
    torch.manual_seed(3)
    state, before = torch.get_rng_state(), tiny_config.to_dict()
    build_model(tiny_config, dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny_config.to_dict() == before


def test_too_large_a_model_is_refused_before_allocation(tiny_config: LlavaConfig, monkeypatch) -> None:
    tiny_config.text_config.vocab_size = 2**40
    with pytest.raises(NotEnoughMemory, match=r"GiB in torch.float32, but cpu has .*bfloat16"):
        build_model(tiny_config)
    tiny_config.text_config.vocab_size = 641
    needed = memory.count_parameters(tiny_config) * 4
    monkeypatch.setattr(memory, "available_memory", lambda device: needed - 1)
    with pytest.raises(NotEnoughMemory):
        build_model(tiny_config)
    build_model(tiny_config, dtype=torch.bfloat16)


def test_available_memory_is_plausible() -> None:
    assert 2**26 < memory.available_memory("cpu") < 2**50


def test_vision_config_without_arguments_is_llava_hr() -> None:
    config = MraVisionConfig()
    assert config.high_config.depths == [3, 3, 27, 3]
    assert (config.image_size, config.adapters, config.low_config.hidden_act) == (1024, True, "quick_gelu")
