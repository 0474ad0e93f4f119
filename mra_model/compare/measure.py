"""Computing in one way: the vision features and logits to compare, and the timed answer."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from mra_kernels import use_backend
from mra_model.decoding import fast_decode
from mra_model.generation import GREEDY
from mra_model.optimization import optimize
from mra_model.timing import synchronize, timed_parts

# Makes a model faster inside a block.
Optimizer = Callable[[LlavaForConditionalGeneration], AbstractContextManager[None]]

TOWER = "vision tower"
VIT = "ViT"
ADAPTERS = "adapters"
PROJECTOR = "projector"
LANGUAGE_MODEL = "language model"
REST = "rest"

FIRST_TOKEN = "first token"
NEXT_TOKENS = "next tokens"


@contextmanager
def optimized(model: LlavaForConditionalGeneration) -> Iterator[None]:
    """`optimize` and `fast_decode` inside the block, after which the tower's is paused, so that the next is at once."""
    tower, decoding = optimize(model), fast_decode(model)
    tower.paused = False
    try:
        yield
    finally:
        tower.paused = True
        decoding.undo()


def what_optimizes(model: LlavaForConditionalGeneration) -> list[str]:
    """What `optimized` changes, in words, and what it leaves alone."""
    tower, decoding = optimize(model), fast_decode(model)
    tower.paused = True
    decoding.undo()
    lines = [f"{part}: {what}" for part, what in tower.faster.items()]
    lines += [f"{part} left alone: {why}" for part, why in tower.left.items()]
    left = f"left alone: {decoding.reason}"
    return [*lines, f"decoding: {'static cache, compiled' if decoding.reason is None else left}"]


@dataclass(frozen=True)
class Way:
    """A way to compute.

    Args:
        backend: of `mra_kernels.use_backend`.
        optimizer: makes the model faster meanwhile; None for none.
    """

    backend: str
    optimizer: Optimizer | None = None

    @contextmanager
    def on(self, model: LlavaForConditionalGeneration) -> Iterator[None]:
        """Inside the block the model computes in this way."""
        with use_backend(self.backend), self.optimizer(model) if self.optimizer is not None else nullcontext():
            yield


@dataclass(frozen=True)
class Outputs:
    """vision_features: [1, L, C_l], what the projector reads; logits: [1, T, V], at every position."""

    vision_features: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Run:
    """One timed answer.

    Attributes:
        reached: seconds until the host had each token.
        parts: seconds of the first token's parts. `TOWER` contains other parts, `REST` is what no part covers.
        tokens: the greedy answer.
        margins: at each token, how far the best logit is ahead of the second, relative to the largest magnitude.
    """

    reached: list[float]
    parts: dict[str, float]
    tokens: list[int]
    margins: list[float]

    @property
    def first_token(self) -> float:
        """Seconds until the first token is known."""
        return self.reached[0]

    @property
    def next_tokens(self) -> float:
        """Seconds for all tokens after it."""
        return self.reached[-1] - self.reached[0]

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
    parts[VIT] = [low.patch_embedding, low.pre_layernorm, *low.layers]
    if len(tower.adapters):
        parts[ADAPTERS] = list(tower.adapters)
    parts["merge"] = [tower.merge]
    parts[TOWER] = [tower]
    parts[PROJECTOR] = [model.model.multi_modal_projector]
    parts[LANGUAGE_MODEL] = [model.model.language_model, model.lm_head]
    return parts


def optimizable_parts_of(model: LlavaForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """The parts whose hooks leave `optimized` its effect: not the adapters, and on a GPU nothing in the tower."""
    parts = parts_of(model)
    kept = {TOWER, PROJECTOR, LANGUAGE_MODEL} if model.device.type == "cuda" else set(parts) - {ADAPTERS}
    return {name: modules for name, modules in parts.items() if name in kept}


@torch.inference_mode()
def outputs(model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor], way: Way) -> Outputs:
    """What all ways of computing must agree on. It also warms the way up."""
    features: list[Tensor] = []
    handle = model.model.vision_tower.register_forward_hook(
        lambda module, args, output: features.append(output.last_hidden_state)
    )
    try:
        with way.on(model):
            logits = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return Outputs(features[0], logits)


def answer(
    model: LlavaForConditionalGeneration,
    inputs: Mapping[str, Tensor],
    count: int,
    parts: Mapping[str, Sequence[nn.Module]],
) -> Run:
    """`generate`'s greedy answer of exactly `count` tokens, timed; an end-of-sequence token does not end it.

    A token counts when the host has it, as a reader of a stream would see it.

    Args:
        model: in evaluation mode.
        inputs: `input_ids`: [1, T] without padding, `pixel_values`: [1, 3, S, S].
        count: of new tokens.
        parts: of the first token, to be timed by hooks.
    """
    device = inputs["input_ids"].device
    found: dict[str, float] = {}
    with ExitStack() as watching:
        take = watching.enter_context(timed_parts(parts, device))

        def stop_watching() -> None:
            found.update(take())
            watching.close()

        clock = _Clock(stop_watching)
        synchronize(device)
        begin = time.perf_counter()
        output = model.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            **GREEDY,
            min_new_tokens=count,
            max_new_tokens=count,
            streamer=clock,
            output_scores=True,
            return_dict_in_generate=True,
        )
    reached = [moment - begin for moment in clock.moments]
    found[REST] = reached[0] - sum(seconds for name, seconds in found.items() if name != TOWER)
    tokens = output.sequences[0, -count:].tolist()
    return Run(reached, found, tokens, [_margin(row[0]) for row in output.scores])


class _Clock(BaseStreamer):
    """Notes when each token comes.

    Args:
        at_first: called after the first token; the time that it takes does not count.
    """

    def __init__(self, at_first: Callable[[], None]) -> None:
        self.moments: list[float] = []
        self._at_first = at_first
        self._prompt = True
        self._paused = 0.0

    def put(self, value: Tensor) -> None:
        """The prompt comes first."""
        now = time.perf_counter()
        if self._prompt:
            self._prompt = False
            return
        self.moments.append(now - self._paused)
        if len(self.moments) == 1:
            self._at_first()
            self._paused = time.perf_counter() - now

    def end(self) -> None:
        """Nothing is left to do."""


def _margin(row: Tensor) -> float:
    """row: [V] -> (best - second) / largest magnitude; 0 where a logit is NaN."""
    finite = row[row != -torch.inf].double()
    if not bool(finite.isfinite().all()):
        return 0.0
    best, second = finite.topk(2).values.tolist()
    return (best - second) / max(float(finite.abs().max()), 1e-300)
