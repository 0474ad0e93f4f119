"""ConvNeXts that people already have, by `apply_mra_kernels`, beside what they were: forward and training step.

Models have random weights, nothing is downloaded. On a CPU a picture at a time in float32, as it is used there; on a
GPU bfloat16, and as many pictures as give each side about the same work.
"""

import copy
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextModel

from bench.compare import Case, measure
from bench.plan import BACKBONES
from bench.step import Run
from mra_kernels import apply_mra_kernels
from mra_kernels.testing import GRADIENT_FACTOR, VALUE_FACTOR
from mra_model.environment import dtype_name

EAGER, LAST, COMPILED, FUSED = "eager", "eager, channels last", "torch.compile", "fused"

# Pixels of a batch on a GPU: 32 pictures of 224, 2 of 1024.
_PIXELS = 32 * 224**2


def run_forward(run: Run, *, model: str, side: int) -> None:
    """Features of pictures, call by call, without autograd.

    Args:
        run: of the step.
        model: `hf:NAME` of `plan.BACKBONES`, or `timm:NAME` of timm's.
        side: of the pictures.
    """
    plain, pixels = _make(run, model, side)
    variants, facts = _variants(run, plain, pixels, _forward)
    exact = copy.deepcopy(plain).double()
    case = Case(
        name=f"{model} forward, {_sizes(pixels)}",
        labels=_labels(model, pixels, "forward"),
        variants=variants,
        outputs=("features",),
        exact=lambda: _forward(exact, pixels.double()),
        dtype=pixels.dtype,
        allowed=VALUE_FACTOR,
        whole=True,
        facts=facts,
    )
    measure(run, case)


def run_training(run: Run, *, model: str, side: int) -> None:
    """Forward and backward into every parameter, without an optimizer; arguments as for `run_forward`."""
    plain, pixels = _make(run, model, side)
    checked = _checked(plain.train(), pixels)
    variants, facts = _variants(run, plain, pixels, partial(_train, checked))
    exact = copy.deepcopy(plain).double()
    case = Case(
        name=f"{model} training step, {_sizes(pixels)}",
        labels=_labels(model, pixels, "training"),
        variants=variants,
        outputs=tuple(f"grad of {name}" for name in checked),
        exact=lambda: _train(checked, exact, pixels.double()),
        dtype=pixels.dtype,
        allowed=GRADIENT_FACTOR,
        whole=True,
        facts=facts,
    )
    measure(run, case)


def build(model: str, tiny: bool = False) -> nn.Module:
    """`hf:convnext_tiny` or `timm:convnext_tiny` -> the model in evaluation mode, every parameter random.

    Args:
        model: of `transformers` or of `timm`.
        tiny: narrow and shallow.

    Raises:
        ValueError: an unknown model.
        ImportError: timm is not installed.
    """
    family, _, name = model.partition(":")
    dims, depths = (8, 16, 24, 32), (1, 1, 2, 1)
    torch.manual_seed(0)
    if family == "timm":
        found = import_module("timm").create_model(
            name, num_classes=0, **({"dims": dims, "depths": depths} if tiny else {})
        )
    elif name in BACKBONES:
        dims, depths = (dims, depths) if tiny else BACKBONES[name]
        found = ConvNextModel(ConvNextConfig(hidden_sizes=list(dims), depths=list(depths)))
    else:
        raise ValueError(f"no model is called {model!r}")
    # Layer scale and biases of a new model are next to nothing, and would hide what is computed.
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.dim() == 1 else 0)
    return cast(nn.Module, found.eval())


def _make(run: Run, model: str, side: int) -> tuple[nn.Module, Tensor]:
    on_gpu = run.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    side = run.pick(side, 64)
    batch = run.pick(max(1, round(_PIXELS / side**2)), 2) if on_gpu else 1
    pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    return build(model, run.rehearsal).to(run.device, dtype), pixels.to(run.device, dtype)


def _variants(
    run: Run, plain: nn.Module, pixels: Tensor, call: Callable[[nn.Module, Tensor], Any]
) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
    """Calls by variant, and what the report of the fused one says."""
    last, fused = (copy.deepcopy(plain) for _ in range(2))
    last = cast(nn.Module, cast(Any, last).to(memory_format=torch.channels_last))
    report = apply_mra_kernels(fused)
    if not report.replaced:
        raise ValueError(str(report))
    variants: dict[str, Callable[[], Any]] = {
        EAGER: partial(call, plain, pixels),
        LAST: partial(call, last, pixels.to(memory_format=torch.channels_last)),
    }
    if run.device.type == "cuda":
        variants[COMPILED] = partial(call, cast(nn.Module, torch.compile(plain, dynamic=False)), pixels)
    variants[FUSED] = partial(call, fused, pixels)
    return variants, {FUSED: {"report": str(report).splitlines()}}


def _features(model: nn.Module, pixels: Tensor) -> Tensor:
    output = model(pixels)
    return output if isinstance(output, Tensor) else output.last_hidden_state


@torch.no_grad()
def _forward(model: nn.Module, pixels: Tensor) -> Tensor:
    return _features(model, pixels)


def _train(checked: tuple[str, ...], model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """One step without an optimizer: the gradients of `checked`. All gradients are gone afterwards."""
    features = _features(model, pixels)
    # Any fixed gradient that is not the same everywhere.
    grad = torch.linspace(-1, 1, features.numel(), dtype=features.dtype, device=features.device)
    features.backward(grad.view(features.shape))
    # torch.compile puts a prefix before the names, not another order.
    parameters = {name.removeprefix("_orig_mod."): parameter for name, parameter in model.named_parameters()}
    found = [cast(Tensor, parameters[name].grad) for name in checked]
    model.zero_grad(set_to_none=True)
    return found


def _checked(model: nn.Module, pixels: Tensor) -> tuple[str, ...]:
    """The first, the middle and the last parameter that the features depend on."""
    _features(model, pixels).sum().backward()
    names = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return names[0], names[len(names) // 2], names[-1]


def _sizes(pixels: Tensor) -> str:
    return f"B={len(pixels)} {pixels.shape[-1]} {dtype_name(pixels.dtype)}"


def _labels(model: str, pixels: Tensor, direction: str) -> dict[str, str | int | bool]:
    return {
        "suite": "backbones",
        "model": model,
        "batch": len(pixels),
        "side": pixels.shape[-1],
        "dtype": dtype_name(pixels.dtype),
        "direction": direction,
    }
