"""The vision tower at 1024 x 1024 in bfloat16: eager, torch.compile and fused, forward and training step."""

import copy
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlavaConfig

from bench.compare import Case, measure
from bench.step import Run
from bench.timing import Call, replayed
from mra_kernels import use_backend
from mra_kernels.testing import GRADIENT_FACTOR, VALUE_FACTOR
from mra_model import MraVisionConfig
from mra_model.presets import build_model, llava_config, preset_config

EAGER, FUSED = "reference", "auto"

# Gradients that a training step is checked by: the first parameters of both pathways, and one at the end.
CHECKED = ("high.stem.weight", "low.position_embedding", "merge.low_weight")


def run_forward(run: Run, *, batch: int) -> None:
    """Eager against fused, call by call and as CUDA graphs, which take the launch gaps away from both."""
    tower, pixels = _make(run, batch)
    variants: dict[str, Call] = {
        "eager": partial(_forward, tower, pixels, EAGER),
        "eager, cudnn.benchmark": partial(_forward, tower, pixels, EAGER, benchmark=True),
        "fused": partial(_forward, tower, pixels, FUSED),
    }
    if run.device.type == "cuda":
        variants |= {f"{name}, CUDA graph": replayed(call) for name, call in list(variants.items())}
    _measure_forward(run, f"tower forward B={batch}", tower, pixels, variants)


def run_compiled(run: Run, *, batch: int, mode: str | None) -> None:
    """torch.compile of the eager tower, beside eager again so that the two took turns."""
    tower, pixels = _make(run, batch)
    # A rehearsal has no compiler to rely on; the tracing is the same.
    options = {"backend": "eager"} if run.rehearsal else {"mode": mode}
    compiled = cast(nn.Module, torch.compile(tower, dynamic=False, **options))
    variants: dict[str, Call] = {
        "eager": partial(_forward, tower, pixels, EAGER),
        f"torch.compile({mode or 'default'})": partial(_forward, compiled, pixels, EAGER),
    }
    _measure_forward(run, f"tower forward B={batch}, compiled", tower, pixels, variants)
    torch.compiler.reset()


def run_training(run: Run, *, batch: int) -> None:
    """Forward and backward into every parameter, without checkpointing."""
    tower, pixels = _make(run, batch)
    grad = torch.randn_like(_forward(tower, pixels, EAGER))
    case = Case(
        name=f"tower training step B={batch}",
        variants={name: partial(_train, tower, pixels, grad, b) for name, b in (("eager", EAGER), ("fused", FUSED))},
        outputs=tuple(f"grad of {name}" for name in CHECKED),
        exact=lambda: _train_exact(tower, pixels, grad),
        allowed=GRADIENT_FACTOR,
        whole=True,
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


def _make(run: Run, batch: int) -> tuple[nn.Module, Tensor]:
    """The tower with random weights, and pixels [B, 3, S, S] in float32 as the processor gives them."""
    config = run.pick(preset_config, lambda name: tiny_config())("llava-hr-cpu")
    model = build_model(config, dtype=torch.bfloat16, device=run.device)
    side = config.vision_config.image_size
    generator = torch.Generator().manual_seed(0)
    return model.model.vision_tower, torch.randn(batch, 3, side, side, generator=generator).to(run.device)


def _measure_forward(run: Run, name: str, tower: nn.Module, pixels: Tensor, variants: dict[str, Call]) -> None:
    case = Case(
        name=name,
        variants=variants,
        outputs=("features",),
        exact=lambda: _forward(copy.deepcopy(tower).double(), pixels.double(), EAGER),
        allowed=VALUE_FACTOR,
        whole=True,
    )
    measure(run, case)


@torch.no_grad()
def _forward(tower: Callable, pixels: Tensor, backend: str, *, benchmark: bool = False) -> Tensor:
    """pixels: [B, 3, S, S] -> features [B, L, C]."""
    with use_backend(backend), torch.backends.cudnn.flags(enabled=True, benchmark=benchmark):
        return tower(pixels).last_hidden_state


def _train(tower: nn.Module, pixels: Tensor, grad: Tensor, backend: str) -> list[Tensor]:
    """One step without an optimizer; the gradients of `CHECKED`."""
    tower.zero_grad(set_to_none=True)
    with use_backend(backend):
        tower(pixels).last_hidden_state.backward(grad)
    return _checked(tower)


def _train_exact(tower: nn.Module, pixels: Tensor, grad: Tensor) -> list[Tensor]:
    """The same in float64, one picture at a time because of its memory; gradients add up."""
    exact = copy.deepcopy(tower).double()
    exact.zero_grad(set_to_none=True)
    with use_backend(EAGER):
        for picture, of in zip(pixels.double().split(1), grad.double().split(1), strict=True):
            exact(picture).last_hidden_state.backward(of)
    return _checked(exact)


def _checked(tower: nn.Module) -> list[Tensor]:
    parameters = dict(tower.named_parameters())
    return [cast(Tensor, parameters[name].grad) for name in CHECKED]
