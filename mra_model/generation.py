"""Loading a converted model and answering a prompt about pictures: what `mra generate` and `mra compare` share."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from mra_model.configuration_mra import MraVisionConfig
from mra_model.memory import require_memory

PROCESSOR_FILE = "processor_config.json"

# For `generate`. Beams may be a checkpoint's default; they are not greedy, and a streamer refuses them.
GREEDY = {"do_sample": False, "num_beams": 1}


class ModelFolderError(ValueError):
    """A folder that holds no usable model. The message names it and the remedy."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer, and its processor; None where the folder has none."""

    model: LlavaForConditionalGeneration
    processor: Any | None

    def require_processor(self) -> Any:
        """The processor.

        Raises:
            ModelFolderError: there is none, so that no prompt can be read.
        """
        if self.processor is None:
            raise ModelFolderError(
                f"{self.model.name_or_path} has no processor and tokenizer; convert it again with --tokenizer FOLDER"
            )
        return self.processor


def load_model(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Loaded:
    """Loads a folder in the transformers format, in evaluation mode. Nothing is downloaded.

    Args:
        path: what `mra convert` or `save_pretrained` wrote.
        dtype: of the weights; None is the one they are stored in.
        device: where to put them.

    Raises:
        ModelFolderError: no such folder, another kind of model (an original LLaVA-HR checkpoint included), or weights
            that are damaged or not all there.
        NotEnoughMemory: the weights do not fit.
    """
    path = Path(path)
    check_model_folder(path)
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    dtype = dtype or config.dtype or torch.float32
    require_memory(config, dtype, device)
    model = _read_weights(path, dtype)
    processor = None
    if (path / PROCESSOR_FILE).is_file():
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    return Loaded(model.to(device).eval(), processor)


def _read_weights(path: Path, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelFolderError(
            f"{path}: the weights cannot be read ({reason}); convert or download them again"
        ) from error
    if info["missing_keys"]:
        # transformers only warns, and makes the rest up.
        names = sorted(info["missing_keys"])
        raise ModelFolderError(
            f"{path} lacks {len(names)} tensors, {names[0]} among them; convert or download it again"
        )
    return model


def check_model_folder(path: Path) -> None:
    """Raises unless `path` holds a model with our tower in the transformers format.

    Raises:
        ModelFolderError: no such folder, or another kind of model; says what to do with an original checkpoint.
    """
    file = path / "config.json"
    if not path.is_dir():
        raise ModelFolderError(f"{path} is no folder; give one that `mra convert` or save_pretrained wrote")
    if not file.is_file():
        raise ModelFolderError(f"{path} has no config.json; give a folder that `mra convert` or save_pretrained wrote")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFolderError(f"{file} is no JSON ({error}); convert or download the model again") from error
    if not isinstance(config, dict):
        raise ModelFolderError(f"{file} holds no JSON object; convert or download the model again")
    vision = config.get("vision_config")
    if isinstance(vision, dict) and vision.get("model_type") == MraVisionConfig.model_type:
        return
    if "mm_vision_tower" in config:
        raise ModelFolderError(f"{path} is in the authors' format; convert it first: mra convert {path} DST")
    raise ModelFolderError(f"{file} describes a model of type {config.get('model_type')!r} without a tower of LLaVA-HR")


def chat_inputs(processor: Any, prompt: str, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
    """One user's turn about some pictures, in the processor's chat template, as the model's arguments.

    Args:
        processor: of the model.
        prompt: the user's words.
        pictures: shown before the words; none for a turn of text only.

    Returns:
        `input_ids` and `attention_mask`: [1, T], and with pictures `pixel_values`: [N, 3, S, S], float32.
    """
    content: list[dict[str, str]] = [{"type": "image"} for _ in pictures]
    content.append({"type": "text", "text": prompt})
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=list(pictures) or None, return_tensors="pt")
    return dict(inputs)


@torch.inference_mode()
def generate_text(
    loaded: Loaded,
    prompt: str,
    pictures: Sequence[Image.Image] = (),
    max_new_tokens: int = 256,
    streamer: BaseStreamer | None = None,
) -> str:
    """The model's greedy answer to a prompt about some pictures.

    Args:
        loaded: the model and its processor.
        prompt: the user's words.
        pictures: none for a prompt of text only.
        max_new_tokens: the answer's limit, in tokens.
        streamer: gets tokens as they come.

    Raises:
        ModelFolderError: the model has no processor, and so cannot read a prompt.
    """
    processor = loaded.require_processor()
    inputs = {name: value.to(loaded.model.device) for name, value in chat_inputs(processor, prompt, pictures).items()}
    output = loaded.model.generate(**inputs, **GREEDY, max_new_tokens=max_new_tokens, streamer=streamer)
    answer = output[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


__all__ = [
    "PROCESSOR_FILE",
    "Loaded",
    "ModelFolderError",
    "chat_inputs",
    "check_model_folder",
    "generate_text",
    "load_model",
]
