"""The whole models that are compared, with random weights: LLaVA-HR, and LLaVA-1.5 with the same language models.

LLaVA-1.5 is the stock model of transformers: CLIP ViT-L/14 without the class token of its last layer but one, and a
projector of two layers. At a side other than 336 its position embedding simply has that side's size, since random
weights need no interpolation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from bench.step import Run
from mra_model import MraVisionConfig
from mra_model.configuration_mra import clip_large
from mra_model.decoding import fast_decode
from mra_model.environment import default_dtype, dtype_name
from mra_model.presets import build_model, llava_config, preset_config

LLAVA_HR, LLAVA_15 = "LLaVA-HR", "LLaVA-1.5"

# The presets whose language model, and for LLaVA-HR whose tower, a size has. `small` has a tower of full size.
SIZES = {"7B": "llava-hr-7b", "13B": "llava-hr-x-13b", "small": "llava-hr-cpu"}
TINY = "tiny"

# Around the picture in a question, the beginning of the sequence included.
TEXT_TOKENS = 64

# What no answer and no loss is asked about.
_IGNORED = -100

_PATCH = {LLAVA_HR: 32, LLAVA_15: 14}


@dataclass(frozen=True)
class Subject:
    """One model at one side of the picture, in one dtype; everything about it but its weights.

    Args:
        family: `LLAVA_HR` or `LLAVA_15`.
        language: a name in `SIZES`, or `TINY`.
        side: of the square picture, in pixels.
        dtype: to compute in.
        adapters: of a LLaVA-HR; checkpoints of the first training stage have none.
    """

    family: str
    language: str
    side: int
    dtype: torch.dtype
    adapters: bool = True

    def config(self) -> LlavaConfig:
        """The model's config.

        Raises:
            ValueError: an unknown family or language, or a side that does not fit the family.
        """
        if self.family not in _PATCH:
            raise ValueError(f"no family is called {self.family!r}; there are {', '.join(_PATCH)}")
        if self.language not in (*SIZES, TINY):
            raise ValueError(f"no language model is called {self.language!r}; there are {', '.join([*SIZES, TINY])}")
        return self._llava_hr() if self.family == LLAVA_HR else self._llava_15()

    def build(self, device: torch.device | str) -> LlavaForConditionalGeneration:
        """The model in evaluation mode, every parameter random; equal subjects have equal weights.

        Raises:
            NotEnoughMemory: it does not fit; nothing was allocated.
        """
        return build_model(self.config(), dtype=self.dtype, device=device)

    def labels(self) -> dict[str, str | int | bool]:
        """What `Result.labels` says of it, the family apart."""
        return {"language": self.language, "side": self.side, "dtype": dtype_name(self.dtype)}

    def __str__(self) -> str:
        return f"{self.family} {self.language} at {self.side}, {dtype_name(self.dtype)}"

    def _llava_hr(self) -> LlavaConfig:
        if self.language == TINY:
            config = llava_config(_tiny_tower(self.side), _tiny_language())
        else:
            config = preset_config(SIZES[self.language], self.side)
        config.vision_config.adapters = self.adapters
        return config

    def _llava_15(self) -> LlavaConfig:
        patch = _PATCH[LLAVA_15]
        if self.side % patch != 0:
            raise ValueError(f"{LLAVA_15} takes pictures of a side that is a multiple of {patch}, not {self.side}")
        vision = _tiny_clip() if self.language == TINY else clip_large()
        vision.image_size = self.side
        text = _tiny_language() if self.language == TINY else preset_config(SIZES[self.language]).text_config
        return LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=text.vocab_size - 1,
            image_seq_length=(self.side // patch) ** 2,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )


def choose(run: Run, family: str, language: str, side: int, *, adapters: bool = True) -> Subject:
    """The model that a step measures, in the device's usual dtype; in a rehearsal a tiny one of the same structure."""
    real = Subject(family, language, side, default_dtype(run.device), adapters)
    return run.pick(real, replace(real, language=TINY, side=tiny_side(family, side)))


def tiny_side(family: str, side: int) -> int:
    """The side at which the tiny model, made for a sixth of the real one's, computes in the same way."""
    patch = _PATCH[family]
    return round(side / 6 / patch) * patch


def make_inputs(
    config: LlavaConfig, device: torch.device, *, batch: int = 1, text: int = TEXT_TOKENS
) -> dict[str, Tensor]:
    """Fixed token ids, half of the text before the picture and half after it, and random pixels.

    Args:
        config: of the model.
        device: to put them on.
        batch: pictures, each with a question.
        text: tokens of text, the first of which begins the sequence.

    Returns:
        `input_ids`: [B, text + visual tokens], `pixel_values`: [B, 3, S, S] in float32, as a processor gives them.
    """
    image, side = config.image_token_index, config.vision_config.image_size
    # Spread over the vocabulary, past the control tokens and short of the image token.
    start = min(3, image - 1)
    words = [start + index * 37 % (image - start) for index in range(text - 1)]
    half = text // 2 - 1
    row = [config.text_config.bos_token_id, *words[:half], *[image] * config.image_seq_length, *words[half:]]
    pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.tensor([row] * batch, device=device), "pixel_values": pixels.to(device)}


def make_labels(input_ids: Tensor, image: int) -> Tensor:
    """What training is asked for: the text after the picture.

    Args:
        input_ids: [B, T], as `make_inputs` gives them.
        image: the image token.

    Returns:
        [B, T], -100 where nothing is asked.
    """
    before = (input_ids == image).flip(1).cumsum(1).flip(1) > 0
    return input_ids.masked_fill(before, _IGNORED)


def parts_of(model: LlavaForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """The modules of each part of the first token, the same for both families."""
    inner = model.model
    return {
        "tower": [inner.vision_tower],
        "projector": [inner.multi_modal_projector],
        "language model": [inner.language_model, model.lm_head],
    }


@contextmanager
def optimized_llava_15(model: LlavaForConditionalGeneration) -> Iterator[None]:
    """What `optimized` is for LLaVA-HR, by PyTorch's own means: decoding, and on a GPU the tower in CUDA graphs."""
    decoding, tower = fast_decode(model), model.model.vision_tower
    if model.device.type == "cuda":
        # Not the module, whose hooks would be traced. Kept, because compiling takes minutes.
        plain = type(tower).forward.__get__(tower)
        compiled = vars(tower).setdefault("_compiled_forward", torch.compile(plain, mode="reduce-overhead"))
        tower.forward = compiled
    try:
        yield
    finally:
        decoding.undo()
        vars(tower).pop("forward", None)


def weights_bytes(model: nn.Module) -> int:
    """Of the parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


def _tiny_clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )


def _tiny_tower(side: int) -> MraVisionConfig:
    """ViT grid 4, so that the authors' rule holds at a sixth of the real sides."""
    high = {"hidden_sizes": [8, 16, 24, 48], "depths": [1, 1, 2, 1]}
    return MraVisionConfig(image_size=side, low_config=_tiny_clip(), high_config=high)


def _tiny_language() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=129,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
