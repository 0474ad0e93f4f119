"""The MR-Adapter and the merge as the paper writes them (arXiv 2403.03003, equations 3 to 5), in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mra_kernels.reference.adapter_gate import adapter_gate
from mra_kernels.reference.depthwise_conv_gelu import depthwise_conv_gelu
from mra_kernels.reference.gated_resample_add import gated_resample_add, resample


def mr_adapter(low: Tensor, high: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """low: [B, H, W, C_l], high: [B, H', W', C_h] -> [B, H, W, C_l]; `parameters` as `modules.MRAdapter` names them."""
    p = parameters
    hidden = F.gelu(F.linear(high, p["high_conv_weight"], p["high_conv_bias"]))
    h = resample(F.linear(hidden, p["high_proj_weight"], p["high_proj_bias"]), low.shape[1], low.shape[2])
    hidden, _, _ = depthwise_conv_gelu(low, p["low_conv_weight"], p["low_conv_bias"])
    l = low + F.linear(hidden, p["low_proj_weight"], p["low_proj_bias"])  # noqa: E741
    wide = torch.promote_types(low.dtype, torch.float32)
    gate = adapter_gate(
        l.mean((1, 2), dtype=wide),
        h.mean((1, 2), dtype=wide),
        p["gate_up_weight"],
        p["gate_up_bias"],
        p["gate_down_weight"],
        p["gate_down_bias"],
    )
    return gated_resample_add(l, h, gate)


def merge(
    low: Tensor, high: Tensor, low_weight: Tensor, low_bias: Tensor, high_weight: Tensor, high_bias: Tensor
) -> Tensor:
    """low: [B, H, W, C_l], high: [B, H', W', C_h] -> Linear(low) + Linear(resample(high)): [B, H, W, C_l]."""
    resampled = resample(high, low.shape[1], low.shape[2])
    return F.linear(low, low_weight, low_bias) + F.linear(resampled, high_weight, high_bias)
