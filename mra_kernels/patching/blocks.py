"""ConvNeXt blocks of other packages: [B, C, H, W] -> the same, in channels-last memory.

A block's result lies in memory as the next block's kernels read it, so that between blocks nothing is copied; only a
map that comes from elsewhere, channels first, is copied once. Each of the three ops is used or not by itself: a block
whose linear layers have LoRA still has its convolution and norm in one kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from mra_kernels.ops import depthwise_conv_norm, linear_gelu, linear_scale_residual
from mra_kernels.patching.children import (
    fits,
    is_autocast,
    is_dropping,
    is_watched,
    why_not_conv,
    why_not_drop,
    why_not_exactly,
    why_not_gelu,
    why_not_norm,
    why_not_plain,
    why_not_skip,
    why_not_weights,
)
from mra_kernels.patching.fused import Fused


@dataclass(frozen=True)
class Layout:
    """What a class of blocks calls its children.

    Attributes:
        conv, norm: the depthwise convolution and LayerNorm.
        mlp: the child that holds the following; None where the block itself does.
        up, act, between, down, after: in the order in which they run.
        scale: the layer scale, a parameter or None; None where the class has none.
        drop: stochastic depth.
        shortcut: what the residual goes through; None where there is nothing.
    """

    conv: str
    norm: str
    up: str
    act: str
    down: str
    scale: str | None
    mlp: str | None = None
    between: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    drop: str = "drop_path"
    shortcut: str | None = None

    def describes(self, block: nn.Module) -> bool:
        """Whether the block has all of it, and its MLP, where that is a child, nothing else."""
        names = [self.conv, self.norm, self.drop, self.mlp, self.shortcut]
        if not all(name in block._modules for name in names if name is not None):
            return False
        if self.scale is not None and not hasattr(block, self.scale):
            return False
        expected = {self.up, self.act, *self.between, self.down, *self.after}
        found = self.inner(block)._modules.keys()
        return expected <= found if self.mlp is None else expected == found

    def inner(self, block: nn.Module) -> Any:
        """What holds the MLP."""
        return block if self.mlp is None else block._modules[self.mlp]

    def scale_of(self, block: nn.Module) -> Any:
        """The layer scale: [C], or None."""
        return None if self.scale is None else getattr(block, self.scale)

    def named(self, name: str) -> str:
        """A child of the MLP, for readers."""
        return name if self.mlp is None else f"{self.mlp}.{name}"


class Block(Fused):
    """Depthwise 7x7, LayerNorm, MLP with GELU, layer scale, residual."""

    kind = "block"
    uses = ("depthwise_conv_norm", "linear_gelu", "linear_scale_residual")
    separable = True

    @staticmethod
    def why_not(block: nn.Module, detail: Layout) -> dict[str, str]:
        """See `Fused.why_not`."""
        if getattr(block, "use_conv_mlp", False):
            return {"": "conv_mlp=True: its MLP is of convolutions on maps channels first"}
        inner, scale = detail.inner(block)._modules, detail.scale_of(block)
        conv, norm, up, down = detail.conv, detail.norm, detail.up, detail.down
        first, last = ((name, block._modules[name]) for name in (conv, norm))
        reasons = {
            "depthwise_conv_norm": why_not_conv_norm(block, detail) or why_not_weights(first, last),
            "linear_gelu": why_not_up(block, detail) or why_not_weights((detail.named(up), inner[up])),
            "linear_scale_residual": why_not_down(block, detail)
            or why_not_weights((detail.named(down), inner[down]))
            or why_not_plain(str(detail.scale), () if scale is None else (scale,)),
            "GRN": "no kernel computes it; it runs as it is" if "grn" in detail.between else None,
        }
        return {what: reason for what, reason in reasons.items() if reason is not None}

    def forward(self: Any, x: Tensor) -> Tensor:
        """x: [B, C, H, W] -> [B, C, H, W]."""
        if is_watched(x):
            return super().forward(x)  # type: ignore[misc]
        layout: Layout = self.detail
        autocast = is_autocast(x)
        children, inner = self._modules, layout.inner(self)
        with self.served():
            conv, norm = children[layout.conv], children[layout.norm]
            if self._may("depthwise_conv_norm", why_not_conv_norm) and fits(
                x, tensors := (conv.weight, conv.bias, norm.weight, norm.bias), autocast
            ):
                y = depthwise_conv_norm(x.permute(0, 2, 3, 1), *tensors, norm.eps)
            else:
                y = norm(conv(x).permute(0, 2, 3, 1))
            if layout.mlp is not None and why_not_skip(layout.mlp, inner) is not None:
                return self._add(x, inner(y))
            return self._mix(x, y, inner._modules, autocast)

    def _mix(self: Any, x: Tensor, y: Tensor, children: dict[str, Any], autocast: bool) -> Tensor:
        """The MLP and the sum: x: [B, C, H, W], y: [B, H, W, C] -> [B, C, H, W]."""
        layout: Layout = self.detail
        up, down, scale = children[layout.up], children[layout.down], layout.scale_of(self)
        if self._may("linear_gelu", why_not_up) and fits(y, tensors := (up.weight, up.bias), autocast):
            hidden = linear_gelu(y, *tensors)
        else:
            hidden = children[layout.act](up(y))
        for name in layout.between:
            hidden = children[name](hidden)
        # In autocast PyTorch leaves the sum in float32, and so does this.
        drops = [self._modules[layout.drop], *(children[name] for name in layout.after)]
        if not autocast and self._may("linear_scale_residual", why_not_down) and not any(map(is_dropping, drops)):
            tensors = down.weight, down.bias
            if fits(hidden, (x, *tensors) if scale is None else (x, *tensors, scale), autocast):
                return linear_scale_residual(hidden, *tensors, scale, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = down(hidden)
        for name in layout.after:
            y = children[name](y)
        return self._add(x, y)

    def _may(self: Any, op: str, why_not: Callable[[nn.Module, Layout], str | None]) -> bool:
        return op in self.ops and why_not(self, self.detail) is None

    def _add(self: Any, x: Tensor, y: Tensor) -> Tensor:
        """x: [B, C, H, W], y: [B, H, W, C] -> x + layer scale * y, paths dropped: [B, C, H, W]."""
        layout: Layout = self.detail
        scale = layout.scale_of(self)
        y = (y if scale is None else y * scale).permute(0, 3, 1, 2)
        if layout.shortcut is not None:
            x = self._modules[layout.shortcut](x)
        return x + self._modules[layout.drop](y)


def why_not_conv_norm(block: nn.Module, layout: Layout) -> str | None:
    """Why `depthwise_conv_norm` cannot take the place of the first two children."""
    conv, norm = block._modules[layout.conv], block._modules[layout.norm]
    reason = why_not_conv(layout.conv, conv, size=7, stride=1, padding=3, depthwise=True)
    if reason is None:
        reason = why_not_norm(layout.norm, norm, conv.out_channels, first=False)  # type: ignore[union-attr, arg-type]
    return reason


def why_not_up(block: nn.Module, layout: Layout) -> str | None:
    """Why `linear_gelu` cannot take the place of the MLP's first half."""
    children = layout.inner(block)._modules
    up, act, name = children[layout.up], children[layout.act], layout.named(layout.up)
    return (
        _why_not_mlp(block, layout)
        or why_not_exactly(name, up, nn.Linear)
        or why_not_gelu(layout.named(layout.act), act)
    )


def why_not_down(block: nn.Module, layout: Layout) -> str | None:
    """Why `linear_scale_residual` cannot take the place of the MLP's second half and the sum."""
    children = layout.inner(block)._modules
    reason = _why_not_mlp(block, layout) or why_not_exactly(layout.named(layout.down), children[layout.down], nn.Linear)
    for name in layout.after:
        reason = reason or why_not_drop(layout.named(name), children[name])
    reason = reason or why_not_drop(layout.drop, block._modules[layout.drop])
    if layout.shortcut is not None:
        reason = reason or why_not_exactly(layout.shortcut, block._modules[layout.shortcut], nn.Identity)
    return reason


def _why_not_mlp(block: nn.Module, layout: Layout) -> str | None:
    if layout.mlp is None:
        return None
    mlp = layout.inner(block)
    if type(mlp).__name__ not in ("Mlp", "GlobalResponseNormMlp"):
        return f"{layout.mlp} is a {type(mlp).__name__}"
    return why_not_skip(layout.mlp, mlp)


_TIMM = Layout(
    conv="conv_dw",
    norm="norm",
    mlp="mlp",
    up="fc1",
    act="act",
    between=("drop1", "norm"),
    down="fc2",
    after=("drop2",),
    scale="gamma",
    shortcut="shortcut",
)
_TIMM_GRN = replace(_TIMM, between=("drop1", "grn"))
_CONVNEXT = Layout(
    conv="dwconv", norm="layernorm", up="pwconv1", act="act", down="pwconv2", scale="layer_scale_parameter"
)
_DINO = Layout(
    conv="depthwise_conv",
    norm="layer_norm",
    up="pointwise_conv1",
    act="activation_fn",
    down="pointwise_conv2",
    scale="gamma",
)

# By class. The authors of LLaVA-HR call the layer scale `weight`, so that its name does not look like a norm's.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "ConvNeXtBlock": tuple(replace(of, scale=scale) for scale in ("gamma", "weight") for of in (_TIMM, _TIMM_GRN)),
    "ConvNextLayer": (_CONVNEXT,),
    "ConvNextV2Layer": (replace(_CONVNEXT, scale=None, between=("grn",)),),
    "DINOv3ConvNextLayer": (_DINO,),
}
