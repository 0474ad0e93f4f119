"""Whether a fused op may read a module's children in place of calling them, and if not, why.

Every question is asked when a model is patched, for the report, and again at each call, since adapters, hooks and
sharding come and go. Classes of other packages are told by their names, so that none of them is imported.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

# LayerNorm over the channels with the usual parameters, by class; these that are not told otherwise by `data_format`
# take maps channels last, but for `LayerNorm2d`.
NORMS = frozenset(("LayerNorm", "LayerNorm2d", "ConvNextLayerNorm", "ConvNextV2LayerNorm", "DINOv3ConvNextLayerNorm"))

# GELU by the error function, unless `approximate` says otherwise.
GELUS = frozenset(("GELU", "GELUActivation"))


def why_not_skip(name: str, module: nn.Module) -> str | None:
    """None where leaving out the call of `module` leaves out nothing but its forward."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks"
    if "forward" in module.__dict__:
        return f"{name} has a forward of its own"
    return None


def why_not_exactly(name: str, module: nn.Module | None, kind: type[nn.Module]) -> str | None:
    """None for a module of exactly this class, since a subclass may compute anything."""
    if type(module) is not kind:
        return f"{name} is a {type(module).__name__}, not a {kind.__name__}"
    return why_not_skip(name, module)


def why_not_plain(name: str, tensors: Iterable[Tensor | None]) -> str | None:
    """None for tensors in memory of the usual kind, all here."""
    for tensor in tensors:
        if tensor is None:
            return f"{name} lacks a weight or a bias"
        kind = type(tensor)
        if kind is not nn.Parameter and kind is not Tensor and not isinstance(tensor, FakeTensor):
            return f"{name} holds a {kind.__name__}"
        if tensor.numel() == 0 or hasattr(tensor, "ds_id"):
            return f"the weights of {name} are partitioned"
    return None


def why_not_weights(*modules: tuple[str, nn.Module | None]) -> str | None:
    """None for children, by name, whose `weight` and `bias` are both plain."""
    for name, module in modules:
        reason = why_not_plain(name, (module.weight, module.bias))  # type: ignore[union-attr, arg-type]
        if reason is not None:
            return reason
    return None


def why_not_conv(
    name: str, conv: nn.Module | None, *, size: int | None, stride: int | None, padding: int, depthwise: bool
) -> str | None:
    """None for a Conv2d of these numbers, whose stride is its size where none is given; it may lack a bias.

    Args:
        name: for the reason.
        conv: whatever is there.
        size: of its square kernel; None for any.
        stride: None for the size.
        padding: with zeros.
        depthwise: whether each channel has a group of its own, or all are in one.
    """
    reason = why_not_exactly(name, conv, nn.Conv2d)
    if reason is not None:
        return reason
    assert isinstance(conv, nn.Conv2d)
    height, width = conv.kernel_size
    if height != width or (size is not None and height != size):
        return f"{name} has a kernel of {height} x {width}" + (f", not {size} x {size}" if size else "")
    stride = height if stride is None else stride
    if conv.stride != (stride, stride):
        return f"{name} has stride {conv.stride}, not {stride}"
    if conv.dilation != (1, 1):
        return f"{name} has dilation {conv.dilation}"
    if conv.padding != (padding, padding) or conv.padding_mode != "zeros":
        return f"{name} has padding {conv.padding} of {conv.padding_mode}, not {padding} of zeros"
    if conv.groups != (conv.in_channels if depthwise else 1) or (depthwise and conv.in_channels != conv.out_channels):
        return f"{name} has {conv.groups} groups for {conv.in_channels} to {conv.out_channels} channels"
    return None


def why_not_norm(name: str, norm: nn.Module | None, channels: int, *, first: bool) -> str | None:
    """None for LayerNorm over the channels of maps, channels first or last, with weight and bias."""
    kind = type(norm).__name__
    if norm is None or kind not in NORMS:
        return f"{name} is a {kind}, not a known LayerNorm"
    is_first = getattr(norm, "data_format", "channels_first" if kind == "LayerNorm2d" else "") == "channels_first"
    if is_first != first:
        return f"{name} takes maps channels {'first' if is_first else 'last'}"
    # Sizes of subclasses are tuples or lists.
    if tuple(norm.normalized_shape) != (channels,):  # type: ignore[arg-type]
        return f"{name} is over {tuple(norm.normalized_shape)}, not {channels} channels"  # type: ignore[arg-type]
    return why_not_skip(name, norm)


def why_not_gelu(name: str, act: nn.Module | None) -> str | None:
    """None for GELU by the error function."""
    kind = type(act).__name__
    if act is None or kind not in GELUS:
        return f"{name} is a {kind}, not GELU"
    if getattr(act, "approximate", "none") != "none":
        return f"{name} is GELU approximated by {getattr(act, 'approximate', '')}"
    return why_not_skip(name, act)


def why_not_drop(name: str, drop: nn.Module | None) -> str | None:
    """None for what drops at random in training, or never does anything: see `is_dropping`."""
    kind = type(drop)
    if drop is None or not (kind in (nn.Identity, nn.Dropout) or kind.__name__.endswith("DropPath")):
        return f"{name} is a {kind.__name__}"
    return why_not_skip(name, drop)


def is_dropping(drop: nn.Module) -> bool:
    """Whether a call of it drops something now."""
    if not drop.training or type(drop) is nn.Identity:
        return False
    return bool(getattr(drop, "p", 0.0) if type(drop) is nn.Dropout else getattr(drop, "drop_prob", 0.0))


def fits(x: Tensor, tensors: Sequence[Tensor | None], autocast: bool) -> bool:
    """Whether an op may take these beside x: all there and plain, and of x's dtype unless autocast casts them."""
    if why_not_plain("", (x,)) is not None or why_not_plain("", tensors) is not None:
        return False
    dtype = x.dtype
    return autocast or all(tensor.dtype == dtype for tensor in tensors)  # type: ignore[union-attr]


def is_watched(x: Tensor) -> bool:
    """Whether children must be called: for hooks of all modules, for torch.fx, or for torch.func, which no op takes."""
    if _has_any_global_hook() or not isinstance(x, Tensor):
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
