"""The best that a user of PyTorch alone could do for each op, beside eager: other layouts, other library calls.

A route computes the op's outputs from its inputs by library calls. Weights that inference could prepare once are
prepared outside the timed call, and the route's name says so.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.suites.kernel_cases import Inputs, as_list
from bench.suites.kernel_problems import Function
from mra_kernels.ops import OPS
from mra_kernels.reference.gated_resample_add import resample

Context = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Route:
    """One way through the library.

    Args:
        name: of the variant; the library's own begin with `library: `.
        function: from inputs to outputs.
        differentiable: whether autograd can go back through it.
        context: settings that hold while it runs, forward or backward.
    """

    name: str
    function: Function
    differentiable: bool = True
    context: Context = nullcontext


def routes(op: str, inputs: Inputs) -> list[Route]:
    """The routes of an op on the device of its inputs; none where eager is the best there is.

    Args:
        op: its name.
        inputs: what it will be called with; prepared weights are made from them.
    """
    device = next(value for value in inputs.values() if isinstance(value, Tensor)).device.type
    tables = [_COMMON, _ON_CUDA if device == "cuda" else _ON_CPU if has_onednn() else {}]
    found = [route for table in tables if op in table for route in table[op](inputs)]
    if device == "cuda" and op in _CONVOLUTIONS:
        found.append(Route("cudnn.benchmark", _eager(op), context=_cudnn_benchmark))
    return [replace(route, name=f"library: {route.name}") for route in found]


def has_onednn() -> bool:
    """Whether this build of PyTorch has oneDNN's fused products and convolutions."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _depthwise_conv_norm(inputs: Inputs) -> list[Route]:
    def function(given: Inputs) -> list[Tensor]:
        y = _channels_first_convolution(given)
        norm_weight, norm_bias = given["norm_weight"], given["norm_bias"]
        return [F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, given["eps"])]

    return [Route(NCHW, function, context=_without_cudnn)]


def _depthwise_conv_gelu(inputs: Inputs) -> list[Route]:
    return [
        Route(
            NCHW,
            lambda given: _with_means(F.gelu(_channels_first_convolution(given)), given["x"]),
            context=_without_cudnn,
        )
    ]


def _depthwise_gelu_onednn(inputs: Inputs) -> list[Route]:
    convolution = torch.ops.mkldnn._convolution_pointwise.default

    def function(given: Inputs) -> list[Tensor]:
        x = given["x"]
        y = convolution(
            x.permute(0, 3, 1, 2),
            given["weight"],
            given["bias"],
            [3, 3],
            [1, 1],
            [1, 1],
            x.shape[3],
            "gelu",
            [],
            "none",
        )
        return _with_means(y.permute(0, 2, 3, 1), x)

    return [Route("oneDNN convolution with GELU", function, differentiable=False)]


def _patch_conv_norm(inputs: Inputs) -> list[Route]:
    def channels_last(given: Inputs) -> list[Tensor]:
        pixels = given["pixels"].contiguous(memory_format=torch.channels_last)
        return as_list(OPS["patch_conv_norm"].reference(pixels, *list(given.values())[1:]))

    def product(given: Inputs) -> list[Tensor]:
        pixels, weight = given["pixels"], given["weight"]
        batch, planes, height, width = pixels.shape
        k = weight.shape[-1]
        rows, columns = height // k, width // k
        patches = pixels[:, :, : rows * k, : columns * k].reshape(batch, planes, rows, k, columns, k)
        y = F.linear(patches.permute(0, 2, 4, 1, 3, 5).flatten(3), weight.flatten(1), given["bias"])
        return [F.layer_norm(y, y.shape[-1:], given["norm_weight"], given["norm_bias"], given["eps"])]

    return [Route("pixels copied to channels last", channels_last), Route("matrix product of patches", product)]


def _norm_patchify(inputs: Inputs) -> list[Route]:
    def function(given: Inputs) -> list[Tensor]:
        x = given["x"]
        batch, height, width, channels = x.shape
        patches = x[:, : height // 2 * 2, : width // 2 * 2].reshape(batch, height // 2, 2, width // 2, 2, channels)
        y = F.layer_norm(patches.transpose(2, 3), (channels,), given["norm_weight"], given["norm_bias"], given["eps"])
        return [y.reshape(batch, height // 2, width // 2, 4 * channels)]

    return [Route("patches first, then LayerNorm", function)]


def _linear_gelu_onednn(inputs: Inputs) -> list[Route]:
    linear = torch.ops.mkldnn._linear_pointwise.default

    def function(given: Inputs) -> list[Tensor]:
        y = linear(given["x"], given["weight"], given["bias"], "gelu", [], "none")
        return _with_weighted_mean(y, given["mean_weights"])

    return [Route("oneDNN product with GELU", function, differentiable=False)]


def _linear_gelu_cublaslt(inputs: Inputs) -> list[Route]:
    """cuBLASLt's epilogue has the tanh approximation of GELU: its error shows, and may be refused."""

    def function(given: Inputs) -> list[Tensor]:
        x, weight = given["x"], given["weight"]
        y = torch._addmm_activation(given["bias"], x.flatten(0, -2), weight.t(), use_gelu=True)
        return _with_weighted_mean(y.reshape(*x.shape[:-1], -1), given["mean_weights"])

    return [Route("cuBLASLt epilogue, tanh-GELU", function, differentiable=False)]


def _linear_scale_residual(inputs: Inputs) -> list[Route]:
    if inputs["scale"] is None:
        return []

    def function(given: Inputs) -> list[Tensor]:
        y = F.linear(given["x"], given["weight"], given["bias"])
        return [torch.addcmul(given["residual"], y, given["scale"])]

    return [Route("addcmul", function)]


def _linear_scale_residual_onednn(inputs: Inputs) -> list[Route]:
    linear = torch.ops.mkldnn._linear_pointwise.binary
    weight, bias = _folded(inputs)

    def function(given: Inputs) -> list[Tensor]:
        return [linear(given["x"], given["residual"], weight, bias, "add")]

    return [Route("oneDNN product with sum, scale folded into the weight before", function, differentiable=False)]


def _linear_scale_residual_folded(inputs: Inputs) -> list[Route]:
    weight, bias = _folded(inputs)

    def function(given: Inputs) -> list[Tensor]:
        return [given["residual"] + F.linear(given["x"], weight, bias)]

    return [Route("scale folded into the weight before", function, differentiable=False)]


def _gated_resample_add(inputs: Inputs) -> list[Route]:
    def function(given: Inputs) -> list[Tensor]:
        low = given["low"]
        gate = given["gate"][:, None, None, None].to(low.dtype)
        return [torch.addcmul(low, gate, resample(given["high"], *low.shape[1:3]))]

    return [Route("addcmul", function)]


def _gated_projection_add(inputs: Inputs) -> list[Route]:
    def function(given: Inputs) -> list[Tensor]:
        low = given["low"] + F.linear(given["low_hidden"], given["low_weight"], given["low_bias"])
        return [_add_gated(low, given)]

    return [Route("addcmul", function)]


def _gated_projection_onednn(inputs: Inputs) -> list[Route]:
    linear = torch.ops.mkldnn._linear_pointwise.binary

    def function(given: Inputs) -> list[Tensor]:
        low = linear(given["low_hidden"], given["low"], given["low_weight"], given["low_bias"], "add")
        return [_add_gated(low, given)]

    return [Route("oneDNN product with sum, addcmul", function, differentiable=False)]


def _add_gated(low: Tensor, given: Inputs) -> Tensor:
    """low: [B, ..., N] -> low + gate * (h W_h^T + b_h)."""
    gate = given["gate"].to(low.dtype).reshape(-1, *[1] * (low.dim() - 1))
    return torch.addcmul(low, gate, F.linear(given["high_hidden"], given["high_weight"], given["high_bias"]))


def _channels_first_convolution(given: Inputs) -> Tensor:
    """The depthwise convolution in [B, C, H, W], with the copies there and back. -> [B, H, W, C]."""
    x = given["x"].permute(0, 3, 1, 2).contiguous()
    y = F.conv2d(x, given["weight"], given["bias"], padding=3, groups=x.shape[1])
    return y.permute(0, 2, 3, 1).contiguous()


def _with_means(y: Tensor, x: Tensor) -> list[Tensor]:
    """y, x: [B, H, W, C] -> y, and the means of both over the picture: [B, C]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return [y, y.mean((1, 2), dtype=wide), x.mean((1, 2), dtype=wide)]


def _with_weighted_mean(y: Tensor, mean_weights: Tensor | None) -> list[Tensor]:
    """y: [B, ..., N], mean_weights: [L] or None -> y, and with weights the mean [B, N]."""
    if mean_weights is None:
        return [y]
    return [y, torch.einsum("bln,l->bn", y.flatten(1, -2).to(mean_weights.dtype), mean_weights)]


def _folded(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The weight [N, K] and bias [N], multiplied by the scale [N] where there is one, in float32."""
    weight, bias, scale = inputs["weight"], inputs["bias"], inputs["scale"]
    if scale is None:
        return weight, bias
    wide = scale.float()
    return (weight.float() * wide[:, None]).to(weight.dtype), (bias.float() * wide).to(bias.dtype)


def _eager(op: str) -> Function:
    return lambda given: as_list(OPS[op].reference(*given.values()))


def _cudnn_benchmark() -> AbstractContextManager:
    return torch.backends.cudnn.flags(enabled=True, benchmark=True)


def _without_cudnn() -> AbstractContextManager:
    """On a GPU, channels-first maps are for PyTorch's own depthwise kernels; elsewhere this changes nothing."""
    return torch.backends.cudnn.flags(enabled=False)


NCHW = "NCHW with copies"
_CONVOLUTIONS = ("depthwise_conv_gelu", "depthwise_conv_norm", "patch_conv_norm")
_Maker = Callable[[Inputs], list[Route]]
_COMMON: dict[str, _Maker] = {
    "gated_projection_add": _gated_projection_add,
    "gated_resample_add": _gated_resample_add,
    "linear_scale_residual": _linear_scale_residual,
    "norm_patchify": _norm_patchify,
    "patch_conv_norm": _patch_conv_norm,
}
_ON_CPU: dict[str, _Maker] = {
    "depthwise_conv_gelu": _depthwise_gelu_onednn,
    "gated_projection_add": _gated_projection_onednn,
    "linear_gelu": _linear_gelu_onednn,
    "linear_scale_residual": _linear_scale_residual_onednn,
}
# The channels-first convolutions are no baseline on a CPU: they lose to oneDNN, and a backward takes seconds.
_ON_CUDA: dict[str, _Maker] = {
    "depthwise_conv_gelu": _depthwise_conv_gelu,
    "depthwise_conv_norm": _depthwise_conv_norm,
    "linear_gelu": _linear_gelu_cublaslt,
    "linear_scale_residual": _linear_scale_residual_folded,
}
