"""CLIP's encoder layer with its query, key and value as one product, and the sums in the products' epilogues."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention, eager_attention_forward

from mra_kernels import linear_scale_residual
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
        self._layer = layer
        self.packs = Packed(_projections(layer, "weight")), Packed(_projections(layer, "bias"))

    def __call__(self, x: Tensor) -> Tensor:
        """x: [B, L, C] -> [B, L, C]."""
        layer: Any = self._layer
        attention = layer.self_attn
        weight, bias = (pack.whole for pack in self.packs)
        qkv = _linear(layer.layer_norm1(x), weight, bias).unflatten(-1, (3, -1, attention.head_dim))
        # Each [B, heads, L, C / heads].
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        dropout = attention.dropout if attention.training else 0.0
        attended, _ = attend(attention, query, key, value, None, scaling=attention.scale, dropout=dropout)
        out = attention.out_proj
        x = linear_scale_residual(attended.reshape(x.shape), out.weight, out.bias, None, x)
        return mlp(layer.mlp, layer.layer_norm2(x), x)


def mlp(module: CLIPMLP, x: Tensor, residual: Tensor) -> Tensor:
    """x, residual: [B, L, C] -> residual + mlp(x): [B, L, C]."""
    up, down = module.fc1, module.fc2
    if type(module.activation_fn) is not QuickGELUActivation:
        hidden = module.activation_fn(_linear(x, up.weight, up.bias))
        return linear_scale_residual(hidden, down.weight, down.bias, None, residual)
    if x.device.type != "cpu" and x.dtype != torch.float16:
        return mlp_by_silu(x, up, down, residual)
    hidden = _linear(x, up.weight, up.bias)
    hidden = (SHARPNESS * hidden).sigmoid_().mul_(hidden)
    return linear_scale_residual(hidden, down.weight, down.bias, None, residual)


def mlp_by_silu(x: Tensor, up: nn.Linear, down: nn.Linear, residual: Tensor) -> Tensor:
    """The same for quick-GELU, which is silu(1.702 z) / 1.702: the products' epilogues scale their float32 sums.

    One kernel in place remains of the activation's three. Not for float16, whose range the scale would shorten.
    """
    rows = x.flatten(0, -2)
    hidden = torch.addmm(SHARPNESS * up.bias, rows, up.weight.t(), alpha=SHARPNESS)
    hidden = F.silu(hidden, inplace=True)
    return torch.addmm(down.bias, hidden, down.weight.t(), alpha=1 / SHARPNESS).view_as(residual).add_(residual)


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
    return _product.linear(x, weight, bias) if x.device.type == "cpu" else F.linear(x, weight, bias)
