"""The library's matrix products: on a CPU by oneDNN where PyTorch has it for the dtype, which is also its fastest."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    """x: [..., K], weight: [N, K], bias: [N] -> activation(x W^T + b): [..., N], contiguous, rounded once.

    Args:
        x, weight, bias: on one device. A GPU's library adds the bias in its product's epilogue.
        activation: "none", or "gelu" with the exact error function.
    """
    if _has_onednn(x) and x.numel() > 0:
        algorithm = "none" if activation == "gelu" else ""
        # It takes no strides.
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    # With more than three dimensions PyTorch adds the bias in a pass of its own.
    rows = x.flatten(0, -2) if x.dim() > 2 else x
    y = F.linear(rows, weight, bias).contiguous().view(*x.shape[:-1], weight.shape[0])
    return F.gelu(y) if activation == "gelu" else y


def linear_add(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """x: [..., K], weight: [N, K], bias: [N], other: [..., N] -> other + x W^T + b: [..., N], contiguous.

    By oneDNN the sum is in the product's epilogue, rounded once.
    """
    if _has_onednn(x) and x.numel() > 0:
        x, other, weight, bias = x.contiguous(), other.contiguous(), weight.contiguous(), bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, "add")
    return linear(x, weight, bias).add_(other)


def _has_onednn(x: Tensor) -> bool:
    """Whether x is on a CPU, PyTorch has oneDNN, it is enabled, and the processor has what the dtype needs."""
    if x.device.type != "cpu" or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
