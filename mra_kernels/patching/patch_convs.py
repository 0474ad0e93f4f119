"""ConvNeXt's stem and downsample in the modules of other packages: [B, P, S1, S2] -> [B, C, H, W], channels last.

A downsample's weight [N, C, 2, 2] becomes [N, 2 * 2 * C] in the order of a patch row at each call: a copy of the weight
for one less of the map, which is free where the weight is channels last (`model.to(memory_format=...)`).
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mra_kernels.ops import norm_patchify, patch_conv_norm
from mra_kernels.patching.children import (
    fits,
    is_autocast,
    is_watched,
    why_not_conv,
    why_not_norm,
    why_not_plain,
    why_not_weights,
)
from mra_kernels.patching.fused import Fused


@dataclass(frozen=True)
class Pair:
    """Where a stem or a downsample is.

    Attributes:
        names: of the convolution and the norm, in the order in which they run.
        held: the child that holds both; None where the module itself does.
        then: a list of modules that the module runs on the result.
    """

    names: tuple[str, str]
    held: str | None = None
    then: str | None = None

    def children(self, module: nn.Module) -> tuple[Any, Any]:
        """The first and the last child, in the order in which they run."""
        found = list(self._holder(module).values())
        return found[0], found[-1]

    def why_not_two(self, module: nn.Module) -> str | None:
        """None where there are no others."""
        found = self._holder(module)
        if tuple(found) == self.names:
            return None
        kinds = ", ".join(type(child).__name__ for child in found.values())
        return f"it is not a convolution and a norm, but {kinds}"

    def _holder(self, module: nn.Module) -> dict[str, Any]:
        holder: Any = module if self.held is None else module._modules[self.held]
        return holder._modules

    def named(self, name: str) -> str:
        """One of them, for readers: by its name, or its place in a list."""
        return (self.held or "") + (f"[{name}]" if name.isdigit() else name)


class Stem(Fused):
    """Patch convolution, then LayerNorm."""

    kind = "stem"
    uses = ("patch_conv_norm",)

    @staticmethod
    def why_not(module: nn.Module, detail: Pair) -> dict[str, str]:
        """See `Fused.why_not`."""
        conv, norm = detail.children(module)
        conv_name, norm_name = map(detail.named, detail.names)
        reason = why_not_stem(module, detail) or why_not_weights((conv_name, conv), (norm_name, norm))
        return {} if reason is None else {"patch_conv_norm": reason}

    def forward(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        """x: [B, P, S1, S2] -> [B, C, S1 // k, S2 // k]."""
        # Autocast leaves the norm's result in float32.
        if is_watched(x) or is_autocast(x) or why_not_stem(self, self.detail) is not None:
            return super().forward(x, **kwargs)  # type: ignore[misc]
        conv, norm = self.detail.children(self)
        tensors = conv.weight, conv.bias, norm.weight, norm.bias
        if x.shape[1] != conv.in_channels or not fits(x, tensors, False):
            return super().forward(x, **kwargs)  # type: ignore[misc]
        with self.served():
            return _run(self, patch_conv_norm(x, *tensors, norm.eps).permute(0, 3, 1, 2))


class Downsample(Fused):
    """LayerNorm, then convolution 2x2 with stride 2."""

    kind = "downsample"
    uses = ("norm_patchify",)

    @staticmethod
    def why_not(module: nn.Module, detail: Pair) -> dict[str, str]:
        """See `Fused.why_not`."""
        norm, conv = detail.children(module)
        norm_name, conv_name = map(detail.named, detail.names)
        reason = why_not_downsample(module, detail) or why_not_weights((norm_name, norm))
        reason = reason or why_not_plain(conv_name, (conv.weight,))
        return {} if reason is None else {"norm_patchify": reason}

    def forward(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        """x: [B, C, H, W] -> [B, N, H // 2, W // 2]."""
        if is_watched(x) or why_not_downsample(self, self.detail) is not None:
            return super().forward(x, **kwargs)  # type: ignore[misc]
        norm, conv = self.detail.children(self)
        weight = conv.weight
        if not fits(x, (norm.weight, norm.bias, weight), is_autocast(x)):
            return super().forward(x, **kwargs)  # type: ignore[misc]
        with self.served():
            patches = norm_patchify(x.permute(0, 2, 3, 1), norm.weight, norm.bias, norm.eps)
            # With more than two dimensions the bias would be added in a pass of its own.
            y = F.linear(patches.flatten(0, 2), weight.permute(0, 2, 3, 1).flatten(1), conv.bias)
            return _run(self, y.view(*patches.shape[:3], -1).permute(0, 3, 1, 2))


def why_not_stem(module: nn.Module, pair: Pair) -> str | None:
    """Why `patch_conv_norm` cannot take the place of both children."""
    conv, norm = pair.children(module)
    conv_name, norm_name = map(pair.named, pair.names)
    return (
        pair.why_not_two(module)
        or why_not_conv(conv_name, conv, size=None, stride=None, padding=0, depthwise=False)
        or why_not_norm(norm_name, norm, conv.out_channels, first=True)
    )


def why_not_downsample(module: nn.Module, pair: Pair) -> str | None:
    """Why `norm_patchify` and a product cannot take the place of both children."""
    norm, conv = pair.children(module)
    norm_name, conv_name = map(pair.named, pair.names)
    return (
        pair.why_not_two(module)
        or why_not_conv(conv_name, conv, size=2, stride=2, padding=0, depthwise=False)
        or why_not_norm(norm_name, norm, conv.in_channels, first=True)
    )


def _run(module: Any, x: Tensor) -> Tensor:
    if module.detail.then is not None:
        for layer in module._modules[module.detail.then]:
            x = layer(x)
    return x
