"""The library's matrix products on a CPU: oneDNN where PyTorch has it for the dtype, which is also its fastest."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    """x: [..., K], weight: [N, K], bias: [N] -> activation(x W^T + b): [..., N], contiguous, rounded once.

    Args:
        x, weight, bias: on a CPU.
        activation: "none", or "gelu" with the exact error function.
    """
    if _has_onednn(x.dtype) and x.numel() > 0:
        algorithm = "none" if activation == "gelu" else ""
        # It takes no strides.
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    y = F.linear(x, weight, bias).contiguous()
    return F.gelu(y) if activation == "gelu" else y


def linear_add(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """x: [..., K], weight: [N, K], bias: [N], other: [..., N] -> other + x W^T + b: [..., N], contiguous.

    By oneDNN the sum is in the product's epilogue, rounded once.
    """
    if _has_onednn(x.dtype) and x.numel() > 0:
        x, other, weight, bias = x.contiguous(), other.contiguous(), weight.contiguous(), bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, "add")
    return F.linear(x, weight, bias).add_(other).contiguous()


def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether PyTorch was built with oneDNN, it is enabled, and the processor has what the dtype needs."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
