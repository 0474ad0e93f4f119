"""The MR-Adapter and the merge of LLaVA-HR's authors: tokens [B, L, C_l] and a map [B, C_h, H', W'] -> [B, L, C_l].

Both take square grids for granted, as the tower does; anything else is left to the module's own forward, and so is
autocast, under which PyTorch keeps the tokens' sums in float32.
"""

from math import isqrt
from typing import Any

from torch import Tensor, nn

from mra_kernels.modules import merge, mr_adapter
from mra_kernels.patching.children import (
    fits,
    is_autocast,
    is_watched,
    why_not_conv,
    why_not_exactly,
    why_not_gelu,
    why_not_skip,
    why_not_weights,
)
from mra_kernels.patching.fused import Fused

# By our name, where the authors keep a weight and its bias. `fast` is the low resolution, whose ViT is the faster one.
_ADAPTER = {
    "low_conv": ("fast_conv",),
    "low_proj": ("fast_proj",),
    "high_conv": ("slow_conv",),
    "high_proj": ("slow_proj",),
    "gate_up": ("gate", "0"),
    "gate_down": ("gate", "2"),
}
_MERGE = "fast_proj", "slow_proj"


class Adapter(Fused):
    """`S2FStitchAlignModuleV2`."""

    kind = "MR-Adapter"
    uses = (
        "adapter_gate",
        "depthwise_conv_gelu",
        "gated_projection_add",
        "gated_resample_add",
        "linear_gelu",
        "linear_scale_residual",
        "project_mean",
    )

    @staticmethod
    def why_not(module: nn.Module, detail: None) -> dict[str, str]:
        """See `Fused.why_not`."""
        weights = [(".".join(path), _child(module, path)) for path in _ADAPTER.values()]
        reason = why_not_adapter(module) or why_not_weights(*weights)
        return {} if reason is None else {"": reason}

    def forward(self: Any, fast_feat: Tensor, slow_feat: Tensor) -> Tensor:
        """fast_feat: [B, L, C_l], slow_feat: [B, C_h, H', W'] -> [B, L, C_l]."""
        grids = None if is_watched(fast_feat) or is_autocast(fast_feat) else _grids(fast_feat, slow_feat)
        if grids is None or why_not_adapter(self) is not None:
            return super().forward(fast_feat, slow_feat)  # type: ignore[misc]
        children = {name: _child(self, path) for name, path in _ADAPTER.items()}
        parameters = {f"{name}_weight": child.weight for name, child in children.items()}
        parameters |= {f"{name}_bias": child.bias for name, child in children.items()}
        if not fits(fast_feat, (slow_feat, *parameters.values()), False):
            return super().forward(fast_feat, slow_feat)  # type: ignore[misc]
        for name in ("low_proj_weight", "high_conv_weight", "high_proj_weight"):
            parameters[name] = parameters[name].flatten(1)
        with self.served():
            return mr_adapter(*grids, parameters).flatten(1, 2)


class Merge(Fused):
    """`MultiPathAlignModule`."""

    kind = "merge"
    uses = ("gated_resample_add", "linear_scale_residual")

    @staticmethod
    def why_not(module: nn.Module, detail: None) -> dict[str, str]:
        """See `Fused.why_not`."""
        weights = [(name, module._modules[name]) for name in _MERGE]
        reason = why_not_merge(module) or why_not_weights(*weights)
        return {} if reason is None else {"": reason}

    def forward(self: Any, fast_feat: Tensor, slow_feat: Tensor) -> Tensor:
        """fast_feat: [B, L, C_l], slow_feat: [B, C_h, H', W'] or [B, L', C_h] -> [B, L, C_l]."""
        grids = None if is_watched(fast_feat) or is_autocast(fast_feat) else _grids(fast_feat, slow_feat)
        if grids is None or why_not_merge(self) is not None:
            return super().forward(fast_feat, slow_feat)  # type: ignore[misc]
        low, high = self._modules["fast_proj"], self._modules["slow_proj"]
        tensors = low.weight, low.bias, high.weight, high.bias
        if not fits(fast_feat, (slow_feat, *tensors), False):
            return super().forward(fast_feat, slow_feat)  # type: ignore[misc]
        with self.served():
            return merge(*grids, *tensors).flatten(1, 2)


def why_not_adapter(module: nn.Module) -> str | None:
    """Why the ops cannot take the place of the adapter's children."""
    children = {".".join(path): _child(module, path) for path in _ADAPTER.values()}
    reason = why_not_conv(
        "fast_conv", children["fast_conv"], size=7, stride=1, padding=3, depthwise=True
    ) or why_not_skip("gate", _child(module, ("gate",)))
    for name in ("fast_proj", "slow_conv", "slow_proj"):
        reason = reason or why_not_conv(name, children[name], size=1, stride=1, padding=0, depthwise=False)
    for name in ("gate.0", "gate.2"):
        reason = reason or why_not_exactly(name, children[name], nn.Linear)
    return reason or why_not_gelu("gate.1", _child(module, ("gate", "1")))


def why_not_merge(module: nn.Module) -> str | None:
    """Why the ops cannot take the place of the merge's children."""
    first, second = _MERGE
    return why_not_exactly(first, module._modules[first], nn.Linear) or why_not_exactly(
        second, module._modules[second], nn.Linear
    )


def _child(module: nn.Module, path: tuple[str, ...]) -> Any:
    found: Any = module
    for name in path:
        found = found._modules[name]
    return found


def _grids(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both as maps [B, H, W, C] where they are square, and one side divides the other."""
    side = isqrt(low.shape[1])
    if high.dim() == 3:
        high_side = isqrt(high.shape[1])
        squares = high_side * high_side == high.shape[1]
    else:
        high_side = high.shape[2]
        squares = high_side == high.shape[3]
    if not squares or side * side != low.shape[1] or 0 in (side, high_side):
        return None
    if side % high_side != 0 and high_side % side != 0:
        return None
    high = high.unflatten(1, (high_side, high_side)) if high.dim() == 3 else high.permute(0, 2, 3, 1)
    return low.unflatten(1, (side, side)), high
