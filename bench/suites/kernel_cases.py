"""What the kernel benchmarks compute: every op at the shapes of LLaVA-HR's towers, and the least work that takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.shapes import VIT, Tower
from mra_kernels.ops import OPS
from mra_kernels.ops._operator import accumulator_dtype
from mra_kernels.testing import SHAPES, WIDE, argument_names

# The arguments of an op by name, in the order of its signature.
Inputs = dict[str, Any]

FORWARD, BACKWARD = "forward", "backward"
DIRECTIONS = (FORWARD, BACKWARD)

# Pictures are data and the weights of a mean constants: no training wants their gradients.
NO_GRADIENT = frozenset(("pixels", "mean_weights"))


@dataclass(frozen=True)
class OpCase:
    """An op at one shape.

    Args:
        op: its name.
        model: the network that has the shape.
        place: where in it.
        shape: sides and channels of the map, for readers.
        dims: sizes as `mra_kernels.testing.make_inputs` takes them, but without the batch.
        eps: of a LayerNorm.
    """

    op: str
    model: str
    place: str
    shape: str
    dims: tuple[Any, ...]
    eps: float = 1e-6

    @property
    def name(self) -> str:
        """One line for readers; no two cases have the same."""
        return f"{self.op} {self.shape}, {self.model} {self.place}"

    def sizes(self, batch: int) -> tuple[Any, ...]:
        """What `make_inputs` takes for `batch` pictures."""
        first, *rest = self.dims
        return ((batch, *first), *rest) if isinstance(first, tuple) else (batch, *self.dims)


def cases(op: str, towers: Sequence[Tower]) -> list[OpCase]:
    """The op at every shape that the towers have; a shape that depends on the ViT alone is there once."""
    return [
        case for index, tower in enumerate(towers) for case in _CASES[op](op, tower) if not index or case.model != VIT
    ]


def as_list(outputs: Any) -> list[Tensor]:
    """One tensor or several -> several."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def wanted(inputs: Inputs) -> list[str]:
    """The inputs whose gradients backward computes."""
    return [name for name, value in inputs.items() if isinstance(value, Tensor) and name not in NO_GRADIENT]


def meta_inputs(case: OpCase, batch: int, dtype: torch.dtype) -> Inputs:
    """The inputs without memory: shapes and dtypes alone."""
    shapes = SHAPES[case.op](*case.sizes(batch))
    inputs: Inputs = {}
    for name in argument_names(case.op):
        kind = accumulator_dtype(dtype) if name in WIDE else dtype
        shape = shapes.get(name)
        inputs[name] = None if shape is None else torch.empty(shape, dtype=kind, device="meta")
    return inputs | ({"eps": case.eps} if "eps" in inputs else {})


def meta_outputs(case: OpCase, batch: int, dtype: torch.dtype) -> list[Tensor]:
    """The outputs without memory."""
    return as_list(OPS[case.op].reference(*meta_inputs(case, batch, dtype).values()))


def least_work(case: OpCase, batch: int, dtype: torch.dtype, direction: str) -> tuple[int, int | None]:
    """Bytes that must move, each input read and each result written once, and FLOPs of products and convolutions.

    Backward reads what the schema of the backward op names, statistics apart, and writes the gradients that are
    wanted. A product or convolution has two gradients, of its input and of its weight, each as much work as itself.
    Means are sums, and do not count.
    """
    inputs = meta_inputs(case, batch, dtype)
    outputs = meta_outputs(case, batch, dtype)
    without_mean = {name: None if name == "mean_weights" else value for name, value in inputs.items()}
    with FlopCounterMode(display=False) as counter:
        OPS[case.op].reference(*without_mean.values())
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    flops = counter.get_total_flops() or None
    if direction == FORWARD:
        return sum(tensor.nbytes for tensor in (*tensors.values(), *outputs)), flops
    forward, schema = (getattr(torch.ops.mra, name).default._schema for name in (case.op, f"{case.op}_backward"))
    known = tensors | {value.name: output for value, output in zip(forward.returns, outputs, strict=False)}
    read = [known[argument.name] for argument in schema.arguments if argument.name in known]
    returned = {value.name.removeprefix("grad_") for value in schema.returns}
    written = [tensors[name] for name in wanted(inputs) if name in returned]
    gradients = 1 if "pixels" in inputs else 2
    return sum(tensor.nbytes for tensor in (*outputs, *read, *written)), flops and gradients * flops


def _stages(op: str, tower: Tower) -> list[OpCase]:
    """Each stage's map."""
    return [
        OpCase(op, tower.name, f"stage {number}", f"{side}x{side}x{channels}", (side, side, channels), tower.eps)
        for number, (side, channels) in enumerate(tower.stages(), start=1)
    ]


def _downsamples(op: str, tower: Tower) -> list[OpCase]:
    """The maps that a downsample reads: all stages' but the last one's."""
    return [
        OpCase(op, tower.name, f"downsample {number}", f"{side}x{side}x{channels}", (side, side, channels), tower.eps)
        for number, (side, channels) in enumerate(tower.stages()[:-1], start=2)
    ]


def _stem(op: str, tower: Tower) -> list[OpCase]:
    side, channels = tower.side, tower.channels[0]
    shape = f"{side}x{side}x3 to {side // 4}x{side // 4}x{channels}"
    return [OpCase(op, tower.name, "stem", shape, (3, side, side, channels), tower.eps)]


def _linear_gelu(op: str, tower: Tower) -> list[OpCase]:
    """The MLPs' first half, and the adapter's high path in its three modes, with the mean that the gate needs."""
    width = tower.channels[-1]
    return [
        *(
            OpCase(op, tower.name, f"stage {number}", f"{side}x{side}x{c}", ((side, side), c, 4 * c))
            for number, (side, c) in enumerate(tower.stages(), start=1)
        ),
        *(
            OpCase(op, tower.name, f"adapter, {mode}", f"{side}x{side}x{width}", ((side, side), width, width, True))
            for mode, (_, side) in tower.modes().items()
        ),
    ]


def _linear_scale_residual(op: str, tower: Tower) -> list[OpCase]:
    """The MLPs' second half, and the adapter's low projection, without a scale, where the high map is interpolated."""
    side, width = tower.modes()["bilinear"][0], tower.width
    return [
        *(
            OpCase(op, tower.name, f"stage {number}", f"{side}x{side}x{c}", ((side, side), 4 * c, c))
            for number, (side, c) in enumerate(tower.stages(), start=1)
        ),
        OpCase(op, VIT, "adapter, bilinear", f"{side}x{side}x{width}", ((side, side), width, width, False)),
    ]


def _depthwise_conv_gelu(op: str, tower: Tower) -> list[OpCase]:
    """The adapter's low path; the pooled mode has the interpolated one's map."""
    places = {tower.grid: "adapter, same grid", tower.modes()["bilinear"][0]: "adapter, bilinear or pooled"}
    width = tower.width
    return [OpCase(op, VIT, place, f"{s}x{s}x{width}", (s, s, width)) for s, place in places.items()]


def _gated_resample_add(op: str, tower: Tower) -> list[OpCase]:
    """The adapter's last step, and the merge's."""
    return [
        OpCase(op, VIT, f"adapter, {mode}", f"{low}x{low}x{tower.width}", (low, low, high, high, tower.width))
        for mode, (low, high) in tower.modes().items()
    ]


def _gated_projection_add(op: str, tower: Tower) -> list[OpCase]:
    """Both projections on one grid, as it is or pooled before."""
    width, high = tower.width, tower.channels[-1]
    return [
        OpCase(op, tower.name, f"adapter, {mode}", f"{side}x{side}x{width}", ((side, side), width, width, high))
        for mode, (side, _) in tower.modes().items()
        if mode != "bilinear"
    ]


def _add_norm(op: str, tower: Tower) -> list[OpCase]:
    """Between the ViT's attention and its MLP, and between its layers."""
    grid, width = tower.grid, tower.width
    return [OpCase(op, VIT, "layer", f"{grid}x{grid}x{width}", ((grid * grid,), width), 1e-5)]


def _attention(op: str, tower: Tower) -> list[OpCase]:
    """Of the ViT, all tokens to all."""
    tokens, heads, channels = tower.grid**2, tower.heads, tower.width // tower.heads
    return [OpCase(op, VIT, "layer", f"{tokens}x{heads}x{channels}", (tokens, tokens, heads, channels))]


def _adapter_gate(op: str, tower: Tower) -> list[OpCase]:
    return [OpCase(op, VIT, "adapter", f"{tower.width}", (tower.width, tower.width // 2))]


def _project_mean(op: str, tower: Tower) -> list[OpCase]:
    """Of the adapter's two projections."""
    width, high = tower.width, tower.channels[-1]
    return [
        OpCase(op, tower.name, "adapter, low", f"{width} to {width}", (width, width)),
        OpCase(op, tower.name, "adapter, high", f"{high} to {width}", (high, width, False)),
    ]


_CASES: dict[str, Callable[[str, Tower], list[OpCase]]] = {
    "adapter_gate": _adapter_gate,
    "add_norm": _add_norm,
    "attention": _attention,
    "depthwise_conv_gelu": _depthwise_conv_gelu,
    "depthwise_conv_norm": _stages,
    "gated_projection_add": _gated_projection_add,
    "gated_resample_add": _gated_resample_add,
    "linear_gelu": _linear_gelu,
    "linear_scale_residual": _linear_scale_residual,
    "norm_patchify": _downsamples,
    "patch_conv_norm": _stem,
    "project_mean": _project_mean,
}
