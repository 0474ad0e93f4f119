"""The vision tower at 1024 x 1024 in bfloat16: eager, torch.compile, fused and optimized, forward and training step."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from bench.compare import Case, measure
from bench.exact import affordable_modules
from bench.step import Run
from bench.timing import Call, replayed
from mra_kernels import use_backend
from mra_kernels.testing import GRADIENT_FACTOR, VALUE_FACTOR
from mra_model import MraVisionConfig, optimize
from mra_model.compare.measure import TOWER, parts_of
from mra_model.environment import dtype_name
from mra_model.presets import build_model, llava_config, preset_config
from mra_model.timing import synchronize, timed_parts

EAGER, FUSED, OPTIMIZED = "eager", "fused", "optimized"
BACKENDS = {EAGER: "reference", FUSED: "auto"}

# Gradients that a training step is checked by: the first parameters of both pathways, and one at the end.
CHECKED = ("high.stem.weight", "low.position_embedding", "merge.low_weight")

# How often parts are timed: apart from the whole, whose times the hooks would disturb.
PART_ROUNDS = {"cuda": 10, "cpu": 2}


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Args:
        name: for readers.
        tower: from pixels to `last_hidden_state`, with random weights.
        pixels: [B, 3, S, S] in float32, as the processor gives them.
        parts: modules by part, see `timed_parts`.
    """

    name: str
    tower: nn.Module
    pixels: Tensor
    parts: dict[str, list[nn.Module]]


def run_forward(run: Run, *, batch: int) -> None:
    """Eager against fused, call by call and as CUDA graphs, and the optimized tower, which on a GPU is a graph."""
    subject = _make(run, batch)
    variants = _variants(subject)
    if run.device.type == "cuda":
        variants["eager, cudnn.benchmark"] = partial(_forward, subject.tower, subject.pixels, EAGER, benchmark=True)
        plain = {name: call for name, call in variants.items() if name != OPTIMIZED}
        variants |= {f"{name}, CUDA graph": replayed(call) for name, call in plain.items()}
    _measure_forward(run, subject, variants, "", {})


def run_compiled(run: Run, *, batch: int, mode: str | None) -> None:
    """torch.compile of the eager tower, beside the others again so that all took turns.

    Args:
        run: of the step.
        batch: pictures.
        mode: of torch.compile; None is its default.
    """
    subject = _make(run, batch)
    # A rehearsal has no compiler to rely on; the tracing is the same.
    options: dict[str, Any] = {"backend": "eager"} if run.rehearsal else {"mode": mode}
    compiled = cast(nn.Module, torch.compile(subject.tower, dynamic=False, **options))
    variants = _variants(subject)
    variants["torch.compile"] = partial(_forward, compiled, subject.pixels, EAGER)
    mode = mode or "default"
    _measure_forward(run, subject, variants, f", torch.compile mode {mode}", {"compiled": True, "mode": mode})
    torch.compiler.reset()


def run_training(run: Run, *, batch: int, checkpointing: bool) -> None:
    """Forward and backward into every parameter, without an optimizer.

    Args:
        run: of the step.
        batch: pictures.
        checkpointing: whether blocks, layers and adapters compute their forward again in backward, as
            `gradient_checkpointing_enable` makes them.
    """
    subject = _make(run, batch)
    tower = subject.tower.train()
    if checkpointing:
        cast(Any, tower).gradient_checkpointing_enable()
    grad = torch.randn_like(_forward(tower, subject.pixels, EAGER))
    # Float64 takes a CPU minutes and more memory than it may have; float32 is as good a measure of bfloat16.
    exact_dtype = torch.float64 if run.device.type == "cuda" else torch.float32
    exact = partial(_train_exactly, tower, subject.pixels, grad, exact_dtype)
    steps = {name: partial(_train, tower, subject.pixels, grad, name) for name in BACKENDS}
    case = Case(
        name=f"{_name(subject)} training step, {'with' if checkpointing else 'without'} checkpointing",
        labels=_labels(subject, "training") | {"checkpointing": checkpointing},
        variants=dict(steps),
        outputs=tuple(f"grad of {name}" for name in CHECKED),
        exact=exact,
        allowed=GRADIENT_FACTOR,
        whole=True,
        facts={name: {"exact": dtype_name(exact_dtype)} for name in BACKENDS},
        parts={name: partial(_train_parts, run, step) for name, step in steps.items()},
    )
    measure(run, case)


def tiny_config() -> LlavaConfig:
    """A model of the real structure, for rehearsals: ViT grid 4, pictures of 128 pixels."""
    low = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    tower = MraVisionConfig(
        image_size=128,
        low_config=low | {"image_size": 56, "patch_size": 14},
        high_config={"hidden_sizes": [8, 16, 24, 48], "depths": [1, 1, 2, 1]},
    )
    text = LlamaConfig(vocab_size=33, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    return llava_config(tower, text)


def _make(run: Run, batch: int) -> Subject:
    """The tower of the preset that a CPU can hold, which is the 7B model's, with random weights."""
    config = run.pick(preset_config, lambda name: tiny_config())("llava-hr-cpu")
    model = build_model(config, dtype=torch.bfloat16, device=run.device)
    side = config.vision_config.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, side, side, generator=generator).to(run.device)
    return Subject("tower", model.model.vision_tower, pixels, _parts(model))


def _parts(model: LlavaForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """The disjoint parts of the tower: stem, stages, ViT, adapters, merge."""
    return {name: of for name, of in parts_of(model).items() if name not in (TOWER, "projector", "language model")}


def _name(subject: Subject) -> str:
    batch, _, side, _ = subject.pixels.shape
    return f"{subject.name} {side}x{side} B={batch}"


def _variants(subject: Subject) -> dict[str, Call]:
    """The forward by variant. The optimized tower is a copy with the same weights."""
    optimized = copy.deepcopy(subject.tower)
    optimize(optimized)
    variants: dict[str, Call] = {name: partial(_forward, subject.tower, subject.pixels, name) for name in BACKENDS}
    return variants | {OPTIMIZED: partial(_forward, optimized, subject.pixels, FUSED)}


def _labels(subject: Subject, direction: str) -> dict[str, str | int | bool]:
    batch, _, side, _ = subject.pixels.shape
    return {
        "suite": "vision",
        "model": subject.name,
        "direction": direction,
        "batch": batch,
        "side": side,
        "dtype": "bfloat16",
        "checkpointing": False,
        "compiled": False,
    }


def _measure_forward(
    run: Run, subject: Subject, variants: dict[str, Call], more: str, labels: dict[str, str | int | bool]
) -> None:
    """Records the forward by every variant. Of a batch the first and the last picture are held against float64."""
    ends = [0, len(subject.pixels) - 1][: len(subject.pixels)]
    case = Case(
        name=f"{_name(subject)} forward{more}",
        labels=_labels(subject, "forward") | labels,
        variants=variants,
        outputs=("features",),
        exact=partial(_forward_exactly, subject, ends),
        checked=lambda outputs: [outputs[0][ends]],
        allowed=VALUE_FACTOR,
        whole=True,
        parts={name: partial(_forward_parts, run, subject, variants[name]) for name in BACKENDS},
    )
    measure(run, case)


@torch.no_grad()
def _forward(tower: Callable[[Tensor], Any], pixels: Tensor, side: str, *, benchmark: bool = False) -> Tensor:
    """pixels: [B, 3, S, S] -> features [B, L, C]; `side` is eager or fused."""
    with use_backend(BACKENDS[side]), torch.backends.cudnn.flags(enabled=True, benchmark=benchmark):
        return tower(pixels).last_hidden_state


def _forward_exactly(subject: Subject, pictures: Sequence[int]) -> Tensor:
    """Features of some pictures in float64, one at a time because of the memory: [N, L, C]."""
    tower = copy.deepcopy(subject.tower).double()
    with affordable_modules():
        return torch.cat([_forward(tower, subject.pixels[index : index + 1].double(), EAGER) for index in pictures])


def _forward_parts(run: Run, subject: Subject, call: Call) -> dict[str, float]:
    """Microseconds of each part, medians of a few calls."""
    with timed_parts(subject.parts, run.device) as take:
        return _medians(run, lambda: (call(), take())[1])


def _train(
    tower: nn.Module,
    pixels: Tensor,
    grad: Tensor,
    side: str,
    between: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """One step without an optimizer: the gradients of `CHECKED`. All gradients are gone afterwards.

    Args:
        tower: in training mode.
        pixels: [B, 3, S, S].
        grad: of the features: [B, L, C].
        side: eager or fused.
        between: called after the forward.
    """
    with use_backend(BACKENDS[side]):
        features = tower(pixels).last_hidden_state
        between()
        features.backward(grad)
    parameters = dict(tower.named_parameters())
    found = [cast(Tensor, parameters[name].grad) for name in CHECKED]
    tower.zero_grad(set_to_none=True)
    return found


def _train_exactly(tower: nn.Module, pixels: Tensor, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The gradients of `CHECKED` by eager in a wider dtype, picture by picture because of the memory; they add up."""
    exact = copy.deepcopy(tower).to(dtype)
    pairs = zip(pixels.to(dtype).split(1), grad.to(dtype).split(1), strict=True)
    with affordable_modules():
        each = [_train(exact, picture, of, EAGER) for picture, of in pairs]
    return [torch.stack(of).sum(0) for of in zip(*each, strict=True)]


def _train_parts(run: Run, step: Callable[..., Any]) -> dict[str, float]:
    """Microseconds of forward and backward, medians of a few steps; what checkpointing computes again is backward's."""

    def once() -> dict[str, float]:
        marks = [_now(run)]
        step(between=lambda: marks.append(_now(run)))
        marks.append(_now(run))
        return {"forward": marks[1] - marks[0], "backward": marks[2] - marks[1]}

    return _medians(run, once)


def _medians(run: Run, once: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Seconds of parts, measured several times -> microseconds, by part."""
    rounds = [once() for _ in range(run.pick(PART_ROUNDS[run.device.type], 1))]
    return {name: round(1e6 * median(of[name] for of in rounds), 1) for name in rounds[0]}


def _now(run: Run) -> float:
    """Seconds, when all work is done."""
    synchronize(run.device)
    return time.perf_counter()
