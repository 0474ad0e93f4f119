"""Computing with one backend: the vision features and logits to compare, and the timed answer."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from mra_kernels import use_backend
from mra_model.timing import synchronize, timed_parts

TOWER = "vision tower"
REST = "rest"

FIRST_TOKEN = "first token"
NEXT_TOKENS = "next tokens"

# What no backend changes: a difference in these times is the machine's noise.
SAME_CODE = ("ViT", "projector", "language model", REST, NEXT_TOKENS)


@dataclass(frozen=True)
class Outputs:
    """vision_features: [1, L, C_l], what the projector reads; logits: [1, T, V], at every position."""

    vision_features: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Run:
    """One timed answer.

    Attributes:
        first_token: seconds until the first token is known.
        next_tokens: seconds for all tokens after it.
        parts: seconds of the first token's parts. `TOWER` contains other parts, `REST` is what no part covers.
        tokens: the greedy answer.
        margins: at each token, how far the best logit is ahead of the second, relative to the largest magnitude.
    """

    first_token: float
    next_tokens: float
    parts: dict[str, float]
    tokens: list[int]
    margins: list[float]

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first."""
        return (len(self.tokens) - 1) / self.next_tokens


def parts_of(model: LlavaForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """The modules of each part, in the order of computing; all but `TOWER` are disjoint. A stage has its downsample."""
    tower = model.model.vision_tower
    low, high = tower.low, tower.high
    parts = {"stem": [high.stem]}
    parts |= {f"stage {number}": [stage] for number, stage in enumerate(high.stages, start=1)}
    parts["ViT"] = [low.patch_embedding, low.pre_layernorm, *low.layers]
    if len(tower.adapters):
        parts["adapters"] = list(tower.adapters)
    parts["merge"] = [tower.merge]
    parts[TOWER] = [tower]
    parts["projector"] = [model.model.multi_modal_projector]
    parts["language model"] = [model.model.language_model, model.lm_head]
    return parts


@torch.inference_mode()
def outputs(model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor], backend: str) -> Outputs:
    """What both ways of computing must agree on. It also warms `backend` up."""
    features: list[Tensor] = []
    handle = model.model.vision_tower.register_forward_hook(
        lambda module, args, output: features.append(output.last_hidden_state)
    )
    try:
        with use_backend(backend):
            logits = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return Outputs(features[0], logits)


@torch.inference_mode()
def answer(
    model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor], backend: str, count: int, device: torch.device
) -> Run:
    """Greedy decoding of exactly `count` tokens, timed. The end-of-sequence token does not end it.

    A token counts when the host has it, as a reader of a stream would see it.

    Args:
        model: in evaluation mode.
        inputs: `input_ids`: [1, T] without padding, `pixel_values`: [1, 3, S, S].
        backend: of `mra_kernels.use_backend`.
        count: of new tokens.
        device: of the model.
    """
    rows: list[Tensor] = []
    never = torch.tensor(model.generation_config.suppress_tokens or [], dtype=torch.long, device=device)
    with use_backend(backend):
        with timed_parts(parts_of(model), device) as take:
            synchronize(device)
            begin = time.perf_counter()
            output = model(**inputs, use_cache=True, logits_to_keep=1)
            tokens = [_best(output, never, rows)]
            first = time.perf_counter()
            parts = take()
        resumed = time.perf_counter()
        while len(tokens) < count:
            latest = torch.tensor([[tokens[-1]]], device=device)
            output = model(input_ids=latest, past_key_values=output.past_key_values, use_cache=True)
            tokens.append(_best(output, never, rows))
        end = time.perf_counter()
    parts[REST] = first - begin - sum(seconds for name, seconds in parts.items() if name != TOWER)
    return Run(first - begin, end - resumed, parts, tokens, [_margin(row) for row in rows])


def _best(output: Any, never: Tensor, rows: list[Tensor]) -> int:
    """The token of the largest logit, those of `never` apart; keeps the row of logits."""
    row = output.logits[0, -1].index_fill(0, never, -torch.inf)
    rows.append(row)
    return int(row.argmax())


def _margin(row: Tensor) -> float:
    """row: [V] -> (best - second) / largest magnitude; 0 where a logit is NaN."""
    finite = row[row != -torch.inf].double()
    if not bool(finite.isfinite().all()):
        return 0.0
    best, second = finite.topk(2).values.tolist()
    return (best - second) / max(float(finite.abs().max()), 1e-300)
