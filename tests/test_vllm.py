"""What vLLM's transformers backend asks of a model, as its source has it.

vLLM needs a GPU, and is not run here: its plug-in's entry point, and the methods that its multimodal backend calls, are
held to what it expects of them (`vllm/plugins`, `vllm/model_executor/models/transformers`, read at 0.33).
"""

from importlib.metadata import entry_points

import pytest
import torch
from checkpoints import DATA
from conftest import make_tiny_config
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mra_model import build_processor, load_image, load_tokenizer

SIDE, GRID = 128, 4


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return build_processor(load_tokenizer(DATA / "llava_data"), SIDE, grid=GRID)


def test_the_plugin_is_found_and_may_be_called_again() -> None:
    (plugin,) = entry_points(group="vllm.general_plugins", name="llava_hr")
    register = plugin.load()
    assert register() is register() is None


def test_the_architecture_is_one_that_vllm_knows() -> None:
    config = make_tiny_config()
    assert config.model_type == "llava"
    assert LlavaForConditionalGeneration.config_class is type(config)
    assert config.get_text_config().model_type == "llama"


def test_attention_can_be_replaced(tiny_model: LlavaForConditionalGeneration) -> None:
    """The backend sets its own attention function, and refuses a model that does not ask the interface for one."""
    assert tiny_model._supports_attention_backend
    assert tiny_model.model.vision_tower._supports_attention_backend


# The last one is what vLLM takes for the largest picture there can be.
@pytest.mark.parametrize("size", [(128, 128), (100, 37), (10_000, 10_000)])
def test_image_tokens_are_counted_without_a_picture(processor: LlavaProcessor, size: tuple[int, int]) -> None:
    counted = processor._get_num_multimodal_tokens(image_sizes=([*size],))
    assert counted["num_image_tokens"] == [GRID**2]
    assert counted["num_image_patches"] == [1]


def test_they_are_as_many_as_the_prompt_gets(processor: LlavaProcessor) -> None:
    inputs = processor(
        images=[load_image(DATA / "llava_data" / "rocket.jpg")] * 2,
        text=f"{processor.image_token} and {processor.image_token}",
        return_mm_token_type_ids=True,
        return_tensors="pt",
    )
    assert (inputs["mm_token_type_ids"] == 1).sum() == 2 * GRID**2
    assert torch.equal(inputs["mm_token_type_ids"] == 1, inputs["input_ids"] == processor.image_token_id)


def test_features_come_a_picture_at_a_time(tiny_model: LlavaForConditionalGeneration) -> None:
    pixels = torch.randn(3, 3, SIDE, SIDE)
    with torch.no_grad():
        features = tiny_model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        (alone,) = tiny_model.model.get_image_features(pixel_values=pixels[1:2], return_dict=True).pooler_output
    assert [tuple(f.shape) for f in features] == [(GRID**2, tiny_model.config.text_config.hidden_size)] * 3
    torch.testing.assert_close(features[1], alone)


def test_weights_are_not_in_layers_that_vllm_exchanges(tiny_model: LlavaForConditionalGeneration) -> None:
    """It exchanges every nn.Linear for its own: the fused ops read bare parameters, so that none is emptied."""
    tower = tiny_model.model.vision_tower
    linear = {name for name, module in tower.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linear
    assert all(name.startswith("low.") for name in linear)
