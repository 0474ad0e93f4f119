"""Pictures and prompts to tensors: a stock `LlavaProcessor`, set up to do what the authors' preprocessing does."""

import copy
from os import PathLike
from pathlib import Path

from transformers import (
    AddedToken,
    AutoTokenizer,
    LlamaTokenizer,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mra_model.configuration_mra import MraVisionConfig
from mra_model.images import load_image

IMAGE_TOKEN = "<image>"

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# Vicuna v1. Pictures come before the text of their turn, wherever they stand in it, as the authors move them.
# The generation block marks what an assistant says, so that training can mask the rest.
CHAT_TEMPLATE = (
    "{%- macro text_of(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- else -%}"
    "{%- for part in content if part['type'] == 'image' -%}{{- '<image>\n' -}}{%- endfor -%}"
    "{%- for part in content if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{{- text_of(messages[0]['content']) + ' ' -}}"
    "{%- set turns = messages[1:] -%}"
    "{%- else -%}"
    "{{- " + repr(SYSTEM_PROMPT + " ") + " -}}"
    "{%- set turns = messages -%}"
    "{%- endif -%}"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- 'USER: ' + text_of(message['content']) + ' ' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- 'ASSISTANT:' -}}"
    "{%- generation -%}{{- ' ' + text_of(message['content']) + '</s>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- raise_exception('A turn must be by user or assistant, but one is by ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)


def load_tokenizer(folder: str | PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a converted `tokenizer.json` or an original `tokenizer.model`, with `<image>` added.

    Llama tokenizers are read as the authors' code did, in legacy mode: a text after `</s>` starts with a space of
    its own. They come back as plain fast tokenizers, because `LlamaTokenizer` does not save that it was legacy.

    Raises:
        FileNotFoundError: the folder has neither file.
        ImportError: reading `tokenizer.model` needs sentencepiece and protobuf.
    """
    folder = Path(folder)
    if (folder / "tokenizer.model").is_file():
        tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=True)
    elif (folder / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, legacy=True)
    else:
        raise FileNotFoundError(f"{folder} has neither tokenizer.json nor tokenizer.model")
    return add_image_token(_plain(tokenizer) if isinstance(tokenizer, LlamaTokenizer) else tokenizer)


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Adds `<image>` to the tokenizer in place: its id is the vocabulary's size. Returns the tokenizer."""
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    return tokenizer


def build_processor(
    tokenizer: PreTrainedTokenizerBase, image_size: int, *, grid: int | None = None, pad: bool = True
) -> LlavaProcessor:
    """A stock processor whose pixels and tokens are those of the authors' preprocessing.

    Args:
        tokenizer: of the language model; it stays as it is, the processor's copy has `<image>` and pads on the left.
        image_size: side S of the square picture, in pixels.
        grid: side of the ViT's grid, `MraVisionConfig.grid`; None is the released models' at this side.
        pad: pad a picture to a square with the mean color; otherwise its middle square is cut out.

    Returns:
        A processor that gives `pixel_values` [B, 3, S, S] and grid * grid image tokens a picture.

    Raises:
        ValueError: an invalid side.
    """
    if grid is None:
        grid = MraVisionConfig(image_size=image_size).grid
    patch_size = max(image_size // grid, 1)
    return LlavaProcessor(
        build_image_processor(image_size, pad),
        _prepare_tokenizer(tokenizer),
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        # Zero wherever the grid divides the side; the processor can only count whole patches.
        num_additional_image_tokens=grid**2 - (image_size // patch_size) ** 2,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )


def build_image_processor(image_size: int, pad: bool = True) -> LlavaImageProcessorPil:
    """The picture's half of `build_processor`, which needs no tokenizer."""
    return LlavaImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}, do_pad=pad
    )


def _plain(tokenizer: LlamaTokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer under a class that is saved and loaded as it is."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.pad_token,
        padding_side=tokenizer.padding_side,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
    )


def _prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy with `<image>`, padding on the left (for batched generation), and `<unk>` as padding if it has none."""
    prepared = add_image_token(copy.deepcopy(tokenizer))
    prepared.padding_side = "left"
    if prepared.pad_token is None:
        prepared.pad_token = prepared.unk_token or prepared.eos_token
    return prepared


__all__ = [
    "CHAT_TEMPLATE",
    "IMAGE_TOKEN",
    "SYSTEM_PROMPT",
    "add_image_token",
    "build_processor",
    "load_image",
    "load_tokenizer",
]
