"""LoRA folders of the authors' training: `adapter_config.json`, the adapter and `non_lora_trainables.bin`, merged."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mra_model.convert.report import ConversionError, ConversionReport, some
from mra_model.convert.sizes import towers_from_arch, towers_from_names
from mra_model.convert.source import Source, assemble, check_original, find_tokenizer, picture_settings
from mra_model.convert.stage1 import clip_tensors, convnext_tensors, language_model
from mra_model.convert.weights import StoredTensor, open_weights, read_json

CONFIG = "adapter_config.json"
TRAINED = "non_lora_trainables.bin"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# Options of PEFT that change what an adapter computes, and the value under which it is W + s B A.
_PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def lora_source(folder: Path, llm: Path | None, clip: Path | None, convnext: Path | None, arch: Path | None) -> Source:
    """A LoRA folder merged into the language model it was trained on.

    Args:
        folder: `adapter_config.json`, `adapter_model.*`, `non_lora_trainables.bin` and the authors' `config.json`.
        llm: folder of the base: a Llama in the transformers format, or a whole original LLaVA-HR checkpoint.
        clip: folder of CLIP, where training froze it and the base is a Llama.
        convnext: file of the ConvNeXt, likewise.
        arch: overrides the sizes that the tower names imply.

    Raises:
        ConversionError: no base given, a part that is absent, or an adapter that is no plain LoRA.
    """
    settings = read_json(folder / CONFIG)
    rank, scale = _rank_and_scale(settings, folder / CONFIG)
    if llm is None:
        raise ConversionError(
            f"{folder} holds a LoRA adapter; give its base {settings.get('base_model_name_or_path')!r} with --llm"
        )
    file = folder / "config.json"
    config = read_json(file)
    check_original(config, file)
    report = ConversionReport()
    text, tensors = language_model(llm)
    if clip:
        tensors |= clip_tensors(clip, report)
    if convnext:
        tensors |= convnext_tensors(convnext, report)
    tensors |= _trained(folder)
    _merge(tensors, _adapter(folder), rank, scale, report)
    towers = towers_from_arch(arch) if arch else towers_from_names(config, file)
    pictures = picture_settings(config, file, report)
    tokenizer = find_tokenizer(folder) or find_tokenizer(llm)
    return assemble(tensors, text, towers, pictures, (llm / "config.json", file), tokenizer, report)


def _rank_and_scale(settings: Mapping[str, Any], file: Path) -> tuple[int, float]:
    for option, plain in _PLAIN.items():
        if settings.get(option, plain) not in (plain, None):
            raise ConversionError(
                f"{file}: {option} is {settings[option]!r}; only plain LoRA can be merged. Merge it with PEFT first"
            )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ConversionError(f"{file}: r is {rank!r} and lora_alpha {alpha!r}, but both must be positive numbers")
    return rank, alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _trained(folder: Path) -> dict[str, StoredTensor]:
    """What was trained beside the adapter: projector, merge, MR-Adapters and, unless frozen, the towers."""
    stored = {key.removeprefix("base_model."): tensor for key, tensor in open_weights(folder / TRAINED).items()}
    if any(key.startswith("model.model.") for key in stored):
        stored = {key.removeprefix("model."): tensor for key, tensor in stored.items()}
    return stored


def _adapter(folder: Path) -> dict[str, StoredTensor]:
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return open_weights(folder / name)
    raise ConversionError(f"{folder} has {CONFIG} but no {' or '.join(ADAPTER_FILES)}")


def _merge(
    tensors: dict[str, StoredTensor],
    adapter: Mapping[str, StoredTensor],
    rank: int,
    scale: float,
    report: ConversionReport,
) -> None:
    """Replaces each adapted weight W: [N, K] of `tensors` by W + scale B A, computed when it is read."""
    pending = set(adapter)
    for key_a in [key for key in adapter if key.endswith(".lora_A.weight")]:
        key_b = key_a.replace(".lora_A.", ".lora_B.")
        key = key_a.removeprefix("base_model.model.").removesuffix("lora_A.weight") + "weight"
        down, up, base = adapter[key_a], adapter.get(key_b), tensors.get(key)
        if up is None or base is None:
            raise ConversionError(f"{down.file}: {key_a} has no {key_b if up is None else f'weight {key} in the base'}")
        if up.shape + down.shape != (*base.shape[:1], rank, rank, *base.shape[1:]):
            raise ConversionError(
                f"{down.file}: {key_a} {list(down.shape)} and its B {list(up.shape)} of r {rank} do not fit {key} "
                f"{list(base.shape)}; is this the base it was trained on?"
            )
        tensors[key] = replace(base, load=partial(_merged, base, up, down, scale))
        pending -= {key_a, key_b}
        report.ignored[key_a] = report.ignored[key_b] = f"merged into {key}"
    if pending or not adapter:
        raise ConversionError(
            f"the adapter holds keys that are no plain LoRA: {some(sorted(pending)) or 'none at all'}"
        )


def _merged(base: StoredTensor, up: StoredTensor, down: StoredTensor, scale: float) -> Tensor:
    """W + scale B A, summed in float32 and rounded once."""
    weight = base.load()
    delta = up.load().float() @ down.load().float()
    return torch.add(weight.float(), delta, alpha=scale).to(weight.dtype)
