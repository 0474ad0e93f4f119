"""A training step of LLaVA-HR as the paper trains it: stage 1 at 384 and stage 2 at 1024, eager and fused.

Forward and backward are measured. The optimizer's step is not: in training it is sharded over the GPUs.
"""

import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from bench.memory import peak
from bench.models import LLAVA_HR, Subject, choose, make_inputs, make_labels, weights_bytes
from bench.step import Result, Run
from bench.timing import summarize, synchronize
from mra_kernels import use_backend
from mra_model.compare.agreement import TOLERANCES, relative_difference
from mra_model.memory import NotEnoughMemory
from mra_model.timing import timed_parts

EAGER, FUSED = "eager", "fused"
VARIANTS = {EAGER: "reference", FUSED: "auto"}

ROUNDS = {"cuda": 7, "cpu": 2}

# The machine that the paper's hours are counted for.
DEVICES = 8

# A step that needs more of a GPU's memory than this share is slowed down by the allocator.
MEMORY_SHARE = 0.9

# Gradients may differ this many times as much as vision features: they went through every layer twice.
GRADIENT_FACTOR = 10.0


@dataclass(frozen=True)
class Stage:
    """One of the paper's two training stages (arXiv 2403.03003, section 4).

    Args:
        side: of the picture, in pixels.
        samples: in the stage.
        batch: over all devices.
        text: tokens of a sample beside the picture's; an assumption, near the data's mean.
        trained: the parameters' names that are trained begin with these.
        checked: parameters whose gradients fused must share with eager.
    """

    side: int
    samples: int
    batch: int
    text: int
    trained: tuple[str, ...]
    checked: tuple[str, ...]


_LATE = ("model.vision_tower.merge.low_weight", "model.multi_modal_projector.linear_1.weight")
_EARLY = (
    "model.vision_tower.high.stem.weight",
    "model.vision_tower.low.position_embedding",
    "model.language_model.layers.0.self_attn.q_proj.weight",
)

# Stage 1 has no adapters yet, and aligns the features with the language model through what comes after both towers.
STAGES = {
    1: Stage(384, 558_000, 256, 64, ("model.vision_tower.merge.", "model.multi_modal_projector."), _LATE),
    2: Stage(1024, 665_000, 128, 256, ("",), (*_EARLY, *_LATE)),
}


@dataclass(frozen=True)
class Setup:
    """What is trained, and how: the model, `STAGES`' number, samples per step, recomputing activations or not."""

    subject: Subject
    stage: int
    batch: int
    checkpointing: bool

    def result(self, variant: str, **found: Any) -> Result:
        """A result of this setup."""
        labels: dict[str, str | int | bool] = {"suite": "train", "stage": self.stage, "batch": self.batch}
        labels |= {"checkpointing": self.checkpointing} | self.subject.labels()
        how = f"B={self.batch}, {'with' if self.checkpointing else 'without'} checkpointing"
        return Result(f"training step of stage {self.stage}, {self.subject}, {how}", variant, labels, **found)


@dataclass(frozen=True)
class Seen:
    """What the first step of a variant gives: its loss, the gradients of `Stage.checked`, and its peak in bytes."""

    loss: float
    gradients: dict[str, Tensor]
    peak: int | None


def run(run: Run, *, stage: int, checkpointing: bool) -> None:
    """The time of forward and backward, each variant's memory, and the hours that the stage would take at this rate.

    On a GPU the batch is the largest that fits, halved from the paper's share of one device; on a CPU it is 1, with
    the small language model.

    Args:
        run: of the step.
        stage: 1 or 2.
        checkpointing: recompute activations in backward instead of keeping them.
    """
    share = STAGES[stage].batch // DEVICES if run.device.type == "cuda" else 1
    setup = Setup(choose_subject(run, stage), stage, run.pick(share, 2), checkpointing)
    try:
        model = prepare(setup.subject, stage, run.device, checkpointing=checkpointing)
    except NotEnoughMemory as error:
        _record_failure(run, setup, f"NotEnoughMemory: {error}")
        return
    while True:
        inputs, seen, problem = make_batch(model, stage, setup.batch, run.device), {}, None
        try:
            # Fused comes first, so that what a process allocates once is counted against it.
            seen = {variant: _first_step(model, inputs, stage, VARIANTS[variant]) for variant in (FUSED, EAGER)}
        except torch.OutOfMemoryError as error:
            problem = f"OutOfMemoryError: {error}".splitlines()[0]
        if problem is None and not _is_tight(model, seen, run.device):
            break
        if setup.batch == 1:
            _record_failure(run, setup, problem or f"it needs more than {MEMORY_SHARE:.0%} of the memory")
            return
        setup = replace(setup, batch=setup.batch // 2)
        del inputs, seen
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
    _measure(run, setup, model, inputs, seen)


def choose_subject(run: Run, stage: int) -> Subject:
    """The model that a stage trains on this device: of 7B on a GPU, the small one on a CPU."""
    language = "7B" if run.device.type == "cuda" else "small"
    return choose(run, LLAVA_HR, language, STAGES[stage].side, adapters=stage > 1)


def prepare(
    subject: Subject, stage: int, device: torch.device, *, checkpointing: bool
) -> LlavaForConditionalGeneration:
    """The model in training mode, with everything frozen that the stage does not train.

    Raises:
        NotEnoughMemory: it does not fit.
    """
    model = subject.build(device).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(STAGES[stage].trained))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_batch(model: LlavaForConditionalGeneration, stage: int, batch: int, device: torch.device) -> dict[str, Tensor]:
    """`batch` samples: `input_ids` and `labels` [B, T], `pixel_values` [B, 3, S, S]."""
    inputs = make_inputs(model.config, device, batch=batch, text=STAGES[stage].text)
    return inputs | {"labels": make_labels(inputs["input_ids"], model.config.image_token_index)}


def step(model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor], backend: str) -> Tensor:
    """Forward and backward; the loss, a scalar."""
    model.zero_grad(set_to_none=True)
    # Checkpointing computes the forward again inside backward.
    with use_backend(backend):
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
    return loss.detach()


def hours(samples: int, batch: int, seconds: float) -> float:
    """That `samples` take on `DEVICES` devices, each of which does `batch` of them in `seconds`."""
    return round(samples / (DEVICES * batch / seconds) / 3600, 3)


def _first_step(model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor], stage: int, backend: str) -> Seen:
    losses: list[Tensor] = []
    model.zero_grad(set_to_none=True)
    beyond = peak(lambda: losses.append(step(model, inputs, backend)), inputs["input_ids"].device)
    parameters = dict(model.named_parameters())
    gradients = {name: cast(Tensor, parameters[name].grad) for name in STAGES[stage].checked}
    return Seen(float(losses[0]), gradients, beyond)


def _is_tight(model: LlavaForConditionalGeneration, seen: Mapping[str, Seen], device: torch.device) -> bool:
    """Whether a variant needs nearly all of a GPU's memory."""
    if device.type != "cuda":
        return False
    most = max(one.peak or 0 for one in seen.values()) + weights_bytes(model)
    return most > MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory


def _measure(
    run: Run,
    setup: Setup,
    model: LlavaForConditionalGeneration,
    inputs: Mapping[str, Tensor],
    seen: Mapping[str, Seen],
) -> None:
    differences, failures = _compare(seen[EAGER], seen[FUSED], setup.subject.dtype)
    timed = _rounds(run, model, inputs, {name: backend for name, backend in VARIANTS.items() if name not in failures})
    for variant in VARIANTS:
        facts = _facts(model, inputs, setup) | (differences if variant == FUSED else {})
        beyond = seen[variant].peak
        if beyond is not None:
            facts["peak bytes"] = weights_bytes(model) + beyond
        if variant in failures:
            run.record(setup.result(variant, facts=facts, failure=failures[variant]))
            continue
        times = summarize([whole for _, whole in timed[variant]])
        parts = {
            "forward": round(median(forward for forward, _ in timed[variant]), 3),
            "backward": round(median(whole - forward for forward, whole in timed[variant]), 3),
        }
        facts["hours estimate"] = hours(STAGES[setup.stage].samples, setup.batch, times.median / 1e6)
        run.record(setup.result(variant, times={"step": times}, parts=parts, facts=facts))


def _compare(eager: Seen, fused: Seen, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, str]]:
    """How far fused is from eager, and by variant why its times must not be shown."""
    if not math.isfinite(eager.loss):
        return {}, {
            EAGER: f"wrong: the loss is {eager.loss}",
            FUSED: f"not checked: {EAGER} gives nothing to compare with",
        }
    loss = abs(fused.loss - eager.loss) / abs(eager.loss)
    gradients = {name: relative_difference(fused.gradients[name], grad) for name, grad in eager.gradients.items()}
    limits = {"the loss": (loss, TOLERANCES[dtype])}
    limits |= {
        f"the gradient of {name}": (apart, GRADIENT_FACTOR * TOLERANCES[dtype]) for name, apart in gradients.items()
    }
    # Written so that a NaN fails.
    wrong = [
        f"{name} differs by {apart:.2e}, more than {most:.0e}"
        for name, (apart, most) in limits.items()
        if not apart <= most
    ]
    failures = {FUSED: f"wrong: {'; '.join(wrong)}"} if wrong else {}
    return {"loss differs by": loss, "gradients differ by": gradients}, failures


def _rounds(
    run: Run, model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor], variants: Mapping[str, str]
) -> dict[str, list[tuple[float, float]]]:
    """By variant, microseconds of forward and of the step; the first step of each, before this, has warmed it up."""
    samples: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
    for index in range(run.pick(ROUNDS[run.device.type], 1)):
        # Each round starts with another variant, so that none always follows the same one.
        for variant in list(variants)[:: 1 if index % 2 == 0 else -1]:
            samples[variant].append(_timed_step(model, inputs, variants[variant], run.device))
    return samples


def _timed_step(
    model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor], backend: str, device: torch.device
) -> tuple[float, float]:
    model.zero_grad(set_to_none=True)
    with timed_parts({"forward": [model]}, device) as take:
        synchronize(device)
        begin = perf_counter()
        step(model, inputs, backend)
        synchronize(device)
        whole = perf_counter() - begin
        return 1e6 * take()["forward"], 1e6 * whole


def _facts(model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor], setup: Setup) -> dict[str, Any]:
    samples = STAGES[setup.stage].samples
    return {
        "samples per step": setup.batch,
        "tokens per sample": inputs["input_ids"].shape[1],
        "weights bytes": weights_bytes(model),
        "trained parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "not in the step": "the optimizer, which is sharded over the GPUs, communication, and loading data",
        "hours are": f"an estimate: {samples} samples on {DEVICES} such devices at this rate, as if nothing else cost",
    }


def _record_failure(run: Run, setup: Setup, failure: str) -> None:
    for variant in VARIANTS:
        run.record(setup.result(variant, failure=failure))
