"""CLIP's encoder layers with query, key and value as one product, and sums in one kernel with what is around them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention, eager_attention_forward

from mra_kernels import add_norm, linear_scale_residual
from mra_kernels.dispatch import has_kernel
from mra_kernels.native import _product
from mra_model.modeling_mra import MraEncoderLayer
from mra_model.optimization.packing import Packed, why_not_plain, why_not_together
from mra_model.optimization.structure import is_hooked

# Of quick-GELU: z * sigmoid(1.702 z).
SHARPNESS = 1.702

_TYPES: dict[str, type[nn.Module]] = {
    "self_attn": CLIPAttention,
    "self_attn.q_proj": nn.Linear,
    "self_attn.k_proj": nn.Linear,
    "self_attn.v_proj": nn.Linear,
    "self_attn.out_proj": nn.Linear,
    "layer_norm1": nn.LayerNorm,
    "layer_norm2": nn.LayerNorm,
    "mlp": CLIPMLP,
    "mlp.fc1": nn.Linear,
    "mlp.fc2": nn.Linear,
}


class LayerRoute:
    """Computes what a layer computes, in evaluation mode: x: [B, L, C] -> [B, L, C].

    Args:
        layer: `why_not` has nothing against it. Its query, key and value move into one matrix.

    Attributes:
        packs: weights [3 * C, C] and biases [3 * C] of query, key and value.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        self.packs = Packed(_projections(layer, "weight")), Packed(_projections(layer, "bias"))

    def __call__(self, x: Tensor) -> Tensor:
        """x: [B, L, C] -> [B, L, C]."""
        return self.between(x, None, None)[0]

    def between(
        self, x: Tensor, normed: Tensor | None, next_norm: nn.LayerNorm | None, sharp_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The layer between two others: the sum at its end and the LayerNorm at the next one's start are one step.

        Args:
            x: [B, L, C].
            normed: its LayerNorm, if the layer before has it: [B, L, C].
            next_norm: the next layer's; None where something else reads the result.
            sharp_bias: see `activate`.

        Returns:
            The result and its LayerNorm, or None for none: [B, L, C] each.
        """
        layer = self.layer
        attention = layer.self_attn
        weight, bias = (pack.whole for pack in self.packs)
        normed = layer.layer_norm1(x) if normed is None else normed
        qkv = _linear(normed, weight, bias).unflatten(-1, (3, -1, attention.head_dim))
        # Each [B, heads, L, C / heads].
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        dropout = attention.dropout if attention.training else 0.0
        attended, _ = attend(attention, query, key, value, None, scaling=attention.scale, dropout=dropout)
        x, normed = add_linear(x, attended.reshape(x.shape), attention.out_proj, layer.layer_norm2)
        hidden, share = activate(layer.mlp, normed, sharp_bias)
        return add_linear(x, hidden, layer.mlp.fc2, next_norm, share)


def run_layers(
    layers: Iterable[nn.Module],
    routes: Sequence[LayerRoute | None],
    sharp_biases: Mapping[LayerRoute, Tensor],
    x: Tensor,
) -> Tensor:
    """Layers one after the other, x: [B, L, C] -> [B, L, C], by their routes where they have one."""
    # Hooks of a layer itself see, and may change, what goes in and comes out: nothing is computed across them.
    joined = [route if route is not None and not is_hooked(route.layer) else None for route in routes]
    normed = None
    for layer, route, inner, following in zip(layers, routes, joined, [*joined[1:], None], strict=True):
        if inner is not None:
            next_norm = None if following is None else following.layer.layer_norm1
            x, normed = inner.between(x, normed, next_norm, sharp_biases.get(inner))
        else:
            # A layer that is none of ours knows no route.
            x, normed = layer(x, None) if route is None else layer(x, None, route=route), None
    return x


def sharp_biases(routes: Iterable[LayerRoute | None], x: Tensor) -> dict[LayerRoute, Tensor]:
    """What `activate` wants to know of each layer whose MLP it computes by silu, [N], all in one kernel.

    At every call, since nothing tells when a parameter's values change.
    """
    sharp = [route for route in routes if route is not None and _by_silu(route.layer.mlp, x)]
    biases = [route.layer.mlp.fc1.bias for route in sharp]
    return dict(zip(sharp, torch._foreach_mul(biases, SHARPNESS), strict=True)) if biases else {}


def add_linear(
    x: Tensor, hidden: Tensor, linear: nn.Linear, norm: nn.LayerNorm | None, share: float = 1.0
) -> tuple[Tensor, Any]:
    """x + share * (hidden W^T) + b, and its LayerNorm.

    The sum is in one kernel with the norm where `add_norm` has one, otherwise in the product's epilogue.

    Args:
        x: [..., C].
        hidden: [..., K].
        linear: weight [C, K], bias [C].
        norm: over C channels; None for no norm.
        share: of the product.

    Returns:
        The sum and its norm, or None for none: [..., C] each.
    """
    weight, bias = linear.weight, linear.bias
    fused = norm is not None and has_kernel("add_norm", x.device, x.dtype)
    if share == 1 and not fused:
        x = linear_scale_residual(hidden, weight, bias, None, x)
        return x, None if norm is None else norm(x)
    if share == 1:
        delta = _linear(hidden, weight, bias)
    else:
        delta = torch.addmm(bias, hidden.flatten(0, -2), weight.t(), alpha=share).view_as(x)
    if norm is not None and fused:
        return add_norm(x, delta, norm.weight, norm.bias, norm.eps)
    x = delta.add_(x)
    return x, None if norm is None else norm(x)


def activate(mlp: CLIPMLP, x: Tensor, sharp_bias: Tensor | None = None) -> tuple[Tensor, float]:
    """x: [B, L, C] -> what the MLP's second product reads: [B, L, N], and the share of that product to take.

    On a GPU quick-GELU is silu(1.702 z) / 1.702: the products' epilogues scale their float32 sums, and one kernel in
    place remains of the activation's three. `sharp_bias` is 1.702 times the first product's bias, where it is known.
    """
    weight, bias = mlp.fc1.weight, mlp.fc1.bias
    if _by_silu(mlp, x):
        bias = SHARPNESS * bias if sharp_bias is None else sharp_bias
        hidden = torch.addmm(bias, x.flatten(0, -2), weight.t(), alpha=SHARPNESS)
        return F.silu(hidden, inplace=True).unflatten(0, x.shape[:-1]), 1 / SHARPNESS
    hidden = _linear(x, weight, bias)
    if type(mlp.activation_fn) is QuickGELUActivation:
        return (SHARPNESS * hidden).sigmoid_().mul_(hidden), 1.0
    return mlp.activation_fn(hidden), 1.0


def _by_silu(mlp: CLIPMLP, x: Tensor) -> bool:
    """Not for float16, whose range the scale would shorten."""
    return type(mlp.activation_fn) is QuickGELUActivation and not on_cpu(x) and x.dtype != torch.float16


def why_not(layer: nn.Module) -> str | None:
    """None where `LayerRoute` can serve a layer, otherwise the reason.

    What it does not call as a module must be plain: LoRA, quantization, parametrizations, hooks and partitioned
    weights keep the layer's own forward.
    """
    if type(layer) is not MraEncoderLayer:
        return f"it is {type(layer).__module__}.{type(layer).__name__}, not MraEncoderLayer"
    for name, expected in _TYPES.items():
        module = layer.get_submodule(name)
        if type(module) is not expected:
            return f"{name} is {type(module).__module__}.{type(module).__name__}, not {expected.__name__}"
        if is_hooked(module):
            return f"{name} has hooks, or a forward of its own"
        for parameter, tensor in module._parameters.items():
            reason = why_not_plain(tensor)
            if reason is not None:
                return f"{name}.{parameter} {reason}"
        if isinstance(module, nn.Linear) and module.weight.shape != (module.out_features, module.in_features):
            return f"{name}.weight has shape {tuple(module.weight.shape)}, as if partitioned"
    for parameter in ("weight", "bias"):
        reason = why_not_together(_projections(layer, parameter))
        if reason is not None:
            return f"the {parameter}s of query, key and value: {reason}"
    return None


def _projections(layer: nn.Module, parameter: str) -> list[nn.Parameter]:
    """Query, key and value, in the order of the packed matrix."""
    attention = layer.get_submodule("self_attn")
    return [getattr(getattr(attention, name), parameter) for name in ("q_proj", "k_proj", "v_proj")]


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x: [..., K] -> x W^T + b: [..., N], by the library that `mra_kernels` uses on the device."""
    return _product.linear(x, weight, bias) if on_cpu(x) else F.linear(x, weight, bias)


def on_cpu(x: Tensor) -> bool:
    """Whether the library is oneDNN, with other epilogues than a GPU's."""
    return x.device.type == "cpu"
