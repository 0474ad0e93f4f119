"""Which modules of a model have another forward to offer, told by their class's name and what they hold."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from mra_kernels.patching.blocks import LAYOUTS, Block
from mra_kernels.patching.fused import Fused
from mra_kernels.patching.llava_hr import Adapter, Merge
from mra_kernels.patching.patch_convs import Downsample, Pair, Stem

KINDS: tuple[type[Fused], ...] = (Block, Stem, Downsample, Adapter, Merge)
OPS = tuple(sorted({op for kind in KINDS for op in kind.uses}))

# By class, children that are an nn.Sequential of a convolution and a norm.
_SEQUENTIALS: dict[str, tuple[str, type[Fused]]] = {
    "ConvNeXt": ("stem", Stem),
    "ConvNeXtStage": ("downsample", Downsample),
}
_EMBEDDINGS = Pair(("patch_embeddings", "layernorm"))
_CONVNEXT = Pair(("0", "1"), held="downsampling_layer", then="layers")
_DINO = Pair(("0", "1"), held="downsample_layers", then="layers")
_PAIRS: dict[str, tuple[Pair, tuple[type[Fused], ...]]] = {
    "ConvNextEmbeddings": (_EMBEDDINGS, (Stem,)),
    "ConvNextV2Embeddings": (_EMBEDDINGS, (Stem,)),
    "ConvNextStage": (_CONVNEXT, (Downsample,)),
    "ConvNextV2Stage": (_CONVNEXT, (Downsample,)),
    # Its first stage begins with the stem.
    "DINOv3ConvNextStage": (_DINO, (Stem, Downsample)),
}
_LLAVA_HR: dict[str, tuple[type[Fused], frozenset[str]]] = {
    "S2FStitchAlignModuleV2": (Adapter, frozenset(("slow_conv", "slow_proj", "fast_conv", "fast_proj", "gate"))),
    "MultiPathAlignModule": (Merge, frozenset(("fast_proj", "slow_proj"))),
}


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[Fused], Any]]:
    """Each module that looks like one of ours: its path, itself, the forward to give it, and that one's `detail`."""
    for path, module in model.named_modules():
        name = own_class(module).__name__
        if name in _SEQUENTIALS:
            child, kind = _SEQUENTIALS[name]
            found = module._modules.get(child)
            if isinstance(found, nn.Sequential) and len(found) > 0:
                yield f"{path}.{child}".lstrip("."), found, kind, Pair(("0", "1"))
        else:
            offer = _offer(name, module)
            if offer is not None:
                yield path, module, *offer


def own_class(module: nn.Module) -> type:
    """The class whose forward a module had when it was made: wrappers, and ours, keep that one."""
    kinds = type(module).__mro__
    return next((kind for kind in kinds if "forward" in vars(kind) and not issubclass(kind, Fused)), nn.Module)


def why_not(module: nn.Module, kind: type[Fused], detail: Any) -> dict[str, str]:
    """By op or part, why it cannot be replaced; `""` stands for all of the module."""
    if "forward" in module.__dict__:
        return {"": "has a forward of its own already"}
    if is_parametrized(module):
        return {"": "has parametrizations"}
    return kind.why_not(module, detail)


def _offer(name: str, module: nn.Module) -> tuple[type[Fused], Any] | None:
    if name in LAYOUTS:
        layout = next((layout for layout in LAYOUTS[name] if layout.describes(module)), None)
        return None if layout is None else (Block, layout)
    if name in _PAIRS:
        pair, (first, *others) = _PAIRS[name]
        holder = module if pair.held is None else module._modules.get(pair.held)
        children = list(holder._modules.values()) if holder is not None else []
        if not children:
            return None
        return (others[0] if others and not isinstance(children[0], nn.Conv2d) else first), pair
    if name in _LLAVA_HR:
        kind, expected = _LLAVA_HR[name]
        return (kind, None) if expected <= module._modules.keys() else None
    return None
