"""What a comparison is about: one model, one picture, one prompt, prepared once for both ways of computing."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from mra_model.configuration_mra import MraVisionConfig
from mra_model.environment import checkout, default_dtype, dtype_name, parse_device, parse_dtype
from mra_model.generation import PROCESSOR_FILE, chat_inputs, check_model_folder, load_model
from mra_model.images import load_image
from mra_model.memory import require_memory
from mra_model.presets import build_model, preset_config
from mra_model.processing_mra import build_image_processor, build_processor

CPU_PRESET = "llava-hr-cpu"
GPU_PRESET = "llava-hr-7b"
PHOTO = "tests/data/llava_data/chelsea.png"
NO_PROMPT = "fixed token ids"
PROMPT = "What is in this picture? Describe it in detail."

# Text tokens on either side of the picture where there is no tokenizer: about as many as the chat template has.
_TEXT_TOKENS = 32


@dataclass(frozen=True)
class Options:
    """What to compare, as the user asked for it.

    Args:
        model: a converted model's folder; None takes `preset`.
        preset: a name in `PRESETS`; None, without `model`, is `CPU_PRESET` or on a GPU `GPU_PRESET`.
        image: a picture's file; None is the repository's photo, outside a repository a drawn picture.
        size: side of the square picture that the model sees, in pixels; None is the model's own.
        prompt: the question; needs a model with a tokenizer.
        dtype: name of the dtype to compute in; None is `default_dtype` of the device.
        device: "auto", "cpu", "cuda" or "cuda:N".
        optimize: whether the fused side is optimized, too: see `mra_model.optimize` and `mra_model.fast_decode`.
    """

    model: str | None = None
    preset: str | None = None
    image: str | None = None
    size: int | None = None
    prompt: str | None = None
    dtype: str | None = None
    device: str = "auto"
    optimize: bool = False

    def to_json(self) -> str:
        """For a process of its own."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Options":
        """The inverse of `to_json`."""
        return Options(**json.loads(text))


@dataclass(frozen=True)
class Subject:
    """Everything about a comparison but the weights, which `build` makes.

    Attributes:
        name: of the preset or the folder.
        device, dtype: where and in what it computes.
        side: of the picture, in pixels.
        picture: what is shown: a file's path, or how it was drawn.
        prompt: the question, or what stands in for one.
        inputs: `input_ids`: [1, T] and `pixel_values`: [1, 3, S, S] in float32, the same tensors for both ways.
        build: the model with its weights, on the device, in evaluation mode.
        notes: what the reader of the result should know.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    side: int
    picture: str
    prompt: str
    inputs: dict[str, Tensor]
    build: Callable[[], LlavaForConditionalGeneration]
    notes: list[str] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.name,
            "device": str(self.device),
            "dtype": dtype_name(self.dtype),
            "side": self.side,
            "picture": self.picture,
            "prompt": self.prompt,
            "prompt_tokens": self.inputs["input_ids"].shape[1],
            "notes": self.notes,
        }


@dataclass(frozen=True)
class _Picture:
    """A picture, what to call it, and what to know about it."""

    image: Image.Image
    name: str
    notes: tuple[str, ...] = ()


def prepare(options: Options) -> Subject:
    """Checks every option and makes the inputs; weights are neither built nor loaded.

    Raises:
        ValueError, FileNotFoundError: an option that names nothing, or an invalid side; says what would be valid.
        NotEnoughMemory: the weights would not fit.
    """
    if options.model is not None and options.preset is not None:
        raise ValueError("--model and --preset exclude each other: give one")
    device = parse_device(options.device)
    dtype = parse_dtype(options.dtype) if options.dtype else default_dtype(device)
    picture = _picture(options.image)
    if options.model is not None:
        return _from_folder(Path(options.model), options, picture, device, dtype)
    return _from_preset(options, picture, device, dtype)


def _from_preset(options: Options, picture: _Picture, device: torch.device, dtype: torch.dtype) -> Subject:
    if options.prompt is not None:
        raise ValueError("a preset has random weights and no tokenizer, so --prompt needs --model")
    preset = options.preset or (CPU_PRESET if device.type == "cpu" else GPU_PRESET)
    config = preset_config(preset, options.size)
    require_memory(config, dtype, device)
    side = config.vision_config.image_size
    return Subject(
        name=preset,
        device=device,
        dtype=dtype,
        side=side,
        picture=picture.name,
        prompt=NO_PROMPT,
        inputs=_on(device, _fixed_inputs(config, side, picture.image)),
        build=lambda: build_model(config, dtype=dtype, device=device),
        notes=[*picture.notes, "random weights: the answer means nothing, its agreement does"],
    )


def _from_folder(
    folder: Path, options: Options, picture: _Picture, device: torch.device, dtype: torch.dtype
) -> Subject:
    check_model_folder(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    side = options.size or config.vision_config.image_size
    config.vision_config.check_side(side)
    require_memory(config, dtype, device)
    notes = list(picture.notes)
    if (folder / PROCESSOR_FILE).is_file():
        prompt = options.prompt or PROMPT
        inputs = chat_inputs(_processor(folder, config.vision_config, side), prompt, [picture.image])
        # One prompt without padding: its mask is all ones, and the answer's loop needs none.
        inputs.pop("attention_mask", None)
    elif options.prompt is not None:
        raise ValueError(f"{folder} has no processor, so --prompt cannot be read; convert it again with --tokenizer")
    else:
        prompt, inputs = NO_PROMPT, _fixed_inputs(config, side, picture.image)
        notes.append("the model has no tokenizer: fixed token ids stand for a prompt")
    return Subject(
        name=str(folder),
        device=device,
        dtype=dtype,
        side=side,
        picture=picture.name,
        prompt=prompt,
        inputs=_on(device, inputs),
        build=lambda: load_model(folder, dtype, device).model,
        notes=notes,
    )


def _on(device: torch.device, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}


def _processor(folder: Path, vision: MraVisionConfig, side: int) -> Any:
    """The folder's processor, set to pictures of `side` pixels."""
    stored = AutoProcessor.from_pretrained(folder, local_files_only=True)
    if side == vision.image_size:
        return stored
    pad = bool(stored.image_processor.do_pad)
    processor = build_processor(stored.tokenizer, side, grid=vision.grid_at(side), pad=pad)
    processor.chat_template = stored.chat_template
    return processor


def _fixed_inputs(config: LlavaConfig, side: int, picture: Image.Image) -> dict[str, Tensor]:
    """Token ids that need no tokenizer: beginning of sequence, some text, the picture, some text."""
    image = config.image_token_index
    text = config.text_config
    # Spread over the vocabulary, past the control tokens and short of the image token.
    start, stop = min(3, image - 1), image
    ids = [start + index * 37 % (stop - start) for index in range(_TEXT_TOKENS)]
    half = _TEXT_TOKENS // 2
    count = config.vision_config.grid_at(side) ** 2
    bos = 1 if text.bos_token_id is None else text.bos_token_id
    tokens = [bos, *ids[:half], *[image] * count, *ids[half:]]
    pixels = build_image_processor(side)(picture, return_tensors="pt")["pixel_values"]
    return {"input_ids": torch.tensor([tokens]), "pixel_values": pixels}


def _picture(file: str | None) -> _Picture:
    """The picture of `file`; without one the repository's photo, outside a repository a drawing."""
    if file is not None:
        return _Picture(load_image(file), file)
    root = checkout()
    if root is not None and (root / PHOTO).is_file():
        return _Picture(load_image(root / PHOTO), PHOTO)
    return _Picture(_drawing(), "drawn", ("the picture is drawn, as no photo is at hand; give yours with --image",))


def _drawing(width: int = 640, height: int = 480) -> Image.Image:
    """Waves of two lengths in three colors: every patch differs from the next."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = [np.sin((c + 1) * 0.011 * x + 0.017 * y) + 0.5 * np.cos(0.23 * x - 0.19 * y * (c + 1)) for c in range(3)]
    values = 127.5 + 127.5 / 1.5 * np.stack(channels, axis=-1)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8), mode="RGB")
