"""Named models with random weights: the two released LLaVA-HR sizes and one that a CPU can run."""

import copy
import math
import zlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mra_model.configuration_mra import MraVisionConfig, convnext_large, convnext_xxlarge
from mra_model.memory import build_empty, require_memory

# For PEFT: `LoraConfig(target_modules=LANGUAGE_MODEL_LORA)`. "all-linear" would also wrap the vision tower.
LANGUAGE_MODEL_LORA = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def llava_config(vision_config: MraVisionConfig, text_config: LlamaConfig) -> LlavaConfig:
    """The stock Llava config around the tower; the last row of the vocabulary is the image token's.

    Args:
        vision_config: the tower.
        text_config: of the language model, its `vocab_size` counting the row of `<image>`.
    """
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=text_config.vocab_size - 1,
        image_seq_length=vision_config.num_image_tokens,
        # The tower returns one map, already merged and without a class token.
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def generation_defaults(config: LlavaConfig) -> GenerationConfig:
    """How `generate` decodes by default: greedily, and never the image token.

    The zero row of `lm_head` gives the image token logit 0, which wins where all others are negative. `suppress_tokens`
    sets it to -inf in one fixed-shape step, so that it works alike in greedy, sampled and beam search, in pipelines
    and with a static cache, and `save_pretrained` stores it with the model.
    """
    text = config.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        suppress_tokens=[config.image_token_index],
    )


def preset_config(name: str, image_size: int | None = None) -> LlavaConfig:
    """A fresh copy of a preset's config, at another side of the picture if asked.

    Raises:
        ValueError: no such preset, or an invalid side.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    config = copy.deepcopy(PRESETS[name])
    if image_size is None:
        return config
    config.vision_config.check_side(image_size)
    config.vision_config.image_size = image_size
    return llava_config(config.vision_config, config.text_config)


def build_model(
    preset: str | LlavaConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LlavaForConditionalGeneration:
    """A model with random weights, in evaluation mode; every parameter is random, so that no error stays hidden.

    Args:
        preset: a name in `PRESETS`, or a config.
        seed: equal seeds give equal weights, up to rounding to `dtype`, on every device.
        dtype: of the weights.
        device: where to build it; on "meta" the weights have shapes only.

    Raises:
        ValueError: no such preset.
        NotEnoughMemory: the weights do not fit; nothing was allocated.
    """
    config = preset_config(preset) if isinstance(preset, str) else copy.deepcopy(preset)
    require_memory(config, dtype, device)
    model = build_empty(config, dtype, device)
    model.generation_config = generation_defaults(config)
    if torch.device(device).type != "meta":
        randomize_parameters(model, seed)
        zero_image_row(model)
    return model.eval()


@torch.no_grad()
def randomize_parameters(model: nn.Module, seed: int = 0) -> None:
    """Fills every parameter with random values under which activations stay near one.

    Layer scale is about 0.3, norms are about one, biases about 0.1, a weight's standard deviation is
    1 / sqrt(fan-in). Each parameter has a generator of its own, seeded by `seed` and its name: the values depend on
    neither order nor device.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        # list() waits for every fill and raises what one of them raised.
        list(pool.map(lambda named: _fill(named[0], named[1], seed), model.named_parameters()))


@torch.no_grad()
def zero_image_row(model: LlavaForConditionalGeneration) -> None:
    """Sets the image token's row of `lm_head` to zero: it is no class that a loss or a decoder should see."""
    model.lm_head.weight[model.config.image_token_index].zero_()


@torch.no_grad()
def _fill(name: str, parameter: nn.Parameter, seed: int) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    mean, deviation = _distribution(name, parameter)
    # Uniform rather than normal numbers, because a CPU draws them three times as fast.
    reach = deviation * math.sqrt(3)
    values = torch.empty(parameter.shape, dtype=torch.float32).uniform_(mean - reach, mean + reach, generator=generator)
    parameter.copy_(values)


def _distribution(name: str, parameter: nn.Parameter) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's random values."""
    if name.endswith("layer_scale"):
        return 0.3, 0.1
    if name.endswith("bias"):
        return 0.0, 0.1
    if parameter.dim() == 1:
        return 1.0, 0.1
    if name.endswith(("embed_tokens.weight", "position_embedding")):
        return 0.0, 1.0
    return 0.0, parameter[0].numel() ** -0.5


def _vicuna(hidden: int, layers: int, heads: int, intermediate: int, vocabulary: int = 32000) -> LlamaConfig:
    """Vicuna 1.5 (a Llama) of the given sizes, with one row more than its vocabulary for `<image>`."""
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary + 1,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


PRESETS: dict[str, LlavaConfig] = {
    "llava-hr-7b": llava_config(
        MraVisionConfig(image_size=1024, high_config=convnext_large()), _vicuna(4096, 32, 32, 11008)
    ),
    "llava-hr-x-13b": llava_config(
        MraVisionConfig(image_size=1024, high_config=convnext_xxlarge()), _vicuna(5120, 40, 40, 13824)
    ),
    # The tower at full size, so that what is measured on a CPU is the real one; 640 pieces fit a small tokenizer.
    "llava-hr-cpu": llava_config(
        MraVisionConfig(image_size=1024, high_config=convnext_large()), _vicuna(256, 4, 4, 688, vocabulary=640)
    ),
}
