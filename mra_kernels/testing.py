"""What tests and benchmarks share: random inputs for every op, memory layouts, tolerances, and a comparison.

The tolerance rule: against float64, an op's error is at most twice the error that PyTorch's own computation makes in
the same dtype, a gradient's five times, plus a floor for the cases in which PyTorch was lucky. The floor is one ulp of
the dtype relative to the tensor, since every result is rounded once, and `FLOOR_ULPS` ulps of the accumulator relative
to `sensitivity`, the problem's own reaction to rounded inputs; a gradient summed over rows gets the square root of
their number on top. Both the norm of the difference and its largest element are held to that. PyTorch's own
computation, the reference, has no such measure: it is allowed fixed numbers of ulps.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mra_kernels.ops._operator import accumulator_dtype

VALUE_FACTOR = 2.0
GRADIENT_FACTOR = 5.0
FLOOR_ULPS = 4.0

# What PyTorch's own computation is allowed: ulps of its dtype, since it rounds every intermediate, and of its sums.
# A CPU sums some gradients of parameters in bfloat16 itself: there it is allowed the square root of the rows.
REFERENCE_ULPS = 4.0
REFERENCE_SUM_ULPS = 32.0

Shape = tuple[int, ...]


# Comparing.


def ulp(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number of `dtype`."""
    return torch.finfo(dtype).eps


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact|| in float64; 0 for equal tensors, also where both are zero or empty."""
    difference = torch.linalg.vector_norm(actual.double() - exact.double()).item()
    return 0.0 if difference == 0 else difference / max(torch.linalg.vector_norm(exact.double()).item(), 1e-300)


def assert_close(
    actual: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    *,
    baseline: Tensor | None = None,
    gradient: bool = False,
    sensitivity: Tensor | None = None,
    rows: int = 1,
    name: str = "result",
) -> None:
    """Holds `actual` to the tolerance rule of this module.

    Args:
        actual: what is tested.
        exact: the same in float64.
        dtype: the dtype that was computed in; statistics and means of a bfloat16 map are float32, but no better.
        baseline: the same by PyTorch in `dtype`. None when PyTorch's own computation is what is tested.
        gradient: whether the gradients' factor applies.
        sensitivity: how much the exact result changes for a relative change of its inputs, in the shape of `exact`;
            by default the result itself.
        rows: over how many rows the result is a sum.
        name: what to call it in the message.

    Raises:
        AssertionError: another shape, NaN or infinity in other places, or an error beyond the limit.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"{name} has shape {tuple(actual.shape)}, but must have {tuple(exact.shape)}")
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    sensitive = exact if sensitivity is None else sensitivity.double().cpu()
    finite = assert_same_nonfinite(actual, exact, name)
    actual, exact, sensitive = actual[finite], exact[finite], sensitive[finite].nan_to_num(posinf=0, neginf=0)
    accumulated = ulp(accumulator_dtype(dtype)) * math.sqrt(rows)
    for kind, norm in (("norm", torch.linalg.vector_norm), ("largest element", _largest)):
        size, reaction = norm(exact).item(), norm(sensitive).item()
        if baseline is None:
            rounded = max(REFERENCE_ULPS, math.sqrt(rows)) * ulp(dtype)
            limit = (rounded + REFERENCE_SUM_ULPS * accumulated) * (size + reaction)
        else:
            factor = GRADIENT_FACTOR if gradient else VALUE_FACTOR
            # A baseline that overflows allows nothing.
            own = norm(baseline.detach().double().cpu()[finite] - exact).nan_to_num(0, 0, 0).item()
            limit = factor * own + ulp(dtype) * size + FLOOR_ULPS * accumulated * reaction
        error = norm(actual - exact).item()
        if not error <= limit:
            raise AssertionError(
                f"{name}: {kind} of the error is {error:.3g}, allowed {limit:.3g} "
                f"(the exact tensor's is {size:.3g}, shape {tuple(finite.shape)}, {dtype})"
            )


def assert_same_nonfinite(actual: Tensor, exact: Tensor, name: str = "result") -> Tensor:
    """Raises unless both are finite in the same places, and returns where that is.

    Raises:
        AssertionError: the number of places that differ, and the first.
    """
    finite = exact.isfinite()
    differ = (actual.isfinite() != finite).nonzero()
    if len(differ):
        first = tuple(differ[0].tolist())
        raise AssertionError(
            f"{name}: {len(differ)} of {finite.numel()} elements are finite on one side only, first at {first}: "
            f"{actual[first].item()} instead of {exact[first].item()}"
        )
    return finite


def _largest(x: Tensor) -> Tensor:
    return x.abs().max() if x.numel() else x.new_zeros(())


# Making inputs.


def make_inputs(
    op: str,
    *dims: Any,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    eps: float = 1e-6,
) -> dict[str, Any]:
    """Random arguments of an op, by name, in the order of its signature; every one of them random.

    Args:
        op: name of the op.
        dims: sizes, as the op's entry in `SHAPES` takes them.
        dtype: of all but gates and means, which are float32 (float64 for float64).
        device: of all tensors; the values do not depend on it.
        seed: of the random numbers.
        eps: of a LayerNorm.
    """
    shapes = SHAPES[op](*dims)
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = {}
    for argument in argument_names(op):
        shape = shapes.get(argument)
        if argument == "eps":
            inputs[argument] = eps
        elif shape is None:
            inputs[argument] = None
        else:
            kind = accumulator_dtype(dtype) if argument in WIDE else dtype
            inputs[argument] = _fill(argument, shape, generator).to(device, kind)
    return inputs


def argument_names(op: str) -> list[str]:
    """The arguments of an op, as its signature and its schema name them."""
    schema = getattr(torch.ops.mra, op).default._schema
    return [argument.name for argument in schema.arguments if argument.name not in ("keep", "backend")]


WIDE = ("low_mean", "high_mean", "hidden_mean", "base_mean", "gate", "mean_weights")


def _fill(name: str, shape: Shape, generator: torch.Generator) -> Tensor:
    """Float64 values that keep activations near 1: weights by their fan-in, layer scale and biases about 0.3."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name == "norm_weight":
        return 1 + 0.3 * x
    if name == "scale" or name.endswith("bias"):
        return 0.3 * x
    if name == "gate":
        return x.tanh()
    if name == "mean_weights":
        # Unequal, and a mean of 1 / L as a mean has it.
        return (0.1 + x.abs()) / (0.1 + x.abs()).sum()
    return x / math.sqrt(max(1, math.prod(shape[1:]))) if name.endswith("weight") else x


def _depthwise(batch: int, height: int, width: int, channels: int) -> dict[str, Shape]:
    return {"x": (batch, height, width, channels), "weight": (channels, 1, 7, 7), "bias": (channels,)}


def _depthwise_conv_norm(batch: int, height: int, width: int, channels: int) -> dict[str, Shape]:
    return _depthwise(batch, height, width, channels) | {"norm_weight": (channels,), "norm_bias": (channels,)}


def _norm_patchify(batch: int, height: int, width: int, channels: int) -> dict[str, Shape]:
    return {"x": (batch, height, width, channels), "norm_weight": (channels,), "norm_bias": (channels,)}


def _patch_conv_norm(
    batch: int, planes: int, height: int, width: int, channels: int, patch: int = 4
) -> dict[str, Shape]:
    vector = (channels,)
    shapes = {"pixels": (batch, planes, height, width), "weight": (channels, planes, patch, patch), "bias": vector}
    return shapes | {"norm_weight": vector, "norm_bias": vector}


def _linear_gelu(lead: Sequence[int], inputs: int, outputs: int, mean: bool = False) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"x": (*lead, inputs), "weight": (outputs, inputs), "bias": (outputs,)}
    return shapes | {"mean_weights": (math.prod(lead[1:]),)} if mean else shapes


def _linear_scale_residual(lead: Sequence[int], inputs: int, outputs: int, scale: bool = True) -> dict[str, Shape]:
    shapes = {"x": (*lead, inputs), "weight": (outputs, inputs), "bias": (outputs,), "residual": (*lead, outputs)}
    return shapes | {"scale": (outputs,)} if scale else shapes


def _gated_resample_add(
    batch: int, height: int, width: int, high_height: int, high_width: int, channels: int
) -> dict[str, Shape]:
    low, high = (batch, height, width, channels), (batch, high_height, high_width, channels)
    return {"low": low, "high": high, "gate": (batch,)}


def _gated_projection_add(lead: Sequence[int], outputs: int, low_inputs: int, high_inputs: int) -> dict[str, Shape]:
    return {
        "low": (*lead, outputs),
        "low_hidden": (*lead, low_inputs),
        "low_weight": (outputs, low_inputs),
        "low_bias": (outputs,),
        "high_hidden": (*lead, high_inputs),
        "high_weight": (outputs, high_inputs),
        "high_bias": (outputs,),
        "gate": (lead[0],),
    }


def _add_norm(lead: Sequence[int], channels: int) -> dict[str, Shape]:
    tokens, vector = (*lead, channels), (channels,)
    return {"x": tokens, "delta": tokens, "norm_weight": vector, "norm_bias": vector}


def _attention(batch: int, queries: int, keys: int, heads: int, channels: int) -> dict[str, Shape]:
    rows = (batch, keys, heads, channels)
    return {"query": (batch, queries, heads, channels), "key": rows, "value": rows}


def _adapter_gate(batch: int, channels: int, hidden: int) -> dict[str, Shape]:
    return {
        "low_mean": (batch, channels),
        "high_mean": (batch, channels),
        "up_weight": (hidden, 2 * channels),
        "up_bias": (hidden,),
        "down_weight": (1, hidden),
        "down_bias": (1,),
    }


def _project_mean(batch: int, inputs: int, outputs: int, base: bool = True) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"hidden_mean": (batch, inputs), "weight": (outputs, inputs), "bias": (outputs,)}
    return shapes | {"base_mean": (batch, outputs)} if base else shapes


SHAPES: dict[str, Callable[..., dict[str, Shape]]] = {
    "adapter_gate": _adapter_gate,
    "add_norm": _add_norm,
    "attention": _attention,
    "depthwise_conv_gelu": _depthwise,
    "depthwise_conv_norm": _depthwise_conv_norm,
    "gated_projection_add": _gated_projection_add,
    "gated_resample_add": _gated_resample_add,
    "linear_gelu": _linear_gelu,
    "linear_scale_residual": _linear_scale_residual,
    "norm_patchify": _norm_patchify,
    "patch_conv_norm": _patch_conv_norm,
    "project_mean": _project_mean,
}


# Memory layouts.


def _sliced(x: Tensor) -> Tensor:
    """Cut out of a tensor that is larger in every dimension, so that no stride is the size of the next one."""
    larger = x.new_full([n + 3 for n in x.shape], float("nan"))
    view = larger[tuple(slice(1, 1 + n) for n in x.shape)]
    return view.copy_(x)


def _offset(x: Tensor) -> Tensor:
    """Contiguous, but one element past an aligned address."""
    return x.new_full((x.numel() + 1,), float("nan"))[1:].view(x.shape).copy_(x)


def _reversed(x: Tensor) -> Tensor:
    """The dimensions in the opposite order in memory."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def _channels_first(x: Tensor) -> Tensor:
    """The last dimension before the middle ones in memory: how a map comes from a library that has [B, C, H, W]."""
    return x.movedim(-1, 1).contiguous().movedim(1, -1) if x.dim() > 2 else _reversed(x)


def _every_second(x: Tensor) -> Tensor:
    """Every second element of the last dimension of a wider tensor."""
    wider = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    return wider[..., ::2].copy_(x)


def _expanded(x: Tensor) -> Tensor:
    """The first picture repeated with stride 0, as a broadcast makes it. Changes values."""
    return x[:1].expand(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "sliced": _sliced,
    "offset": _offset,
    "reversed": _reversed,
    "channels_first": _channels_first,
    "every_second": _every_second,
    "expanded": _expanded,
}
