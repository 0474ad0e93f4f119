"""The twelve ops: a public function each, registered as `torch.ops.mra.<op>` with shapes, gradients and backends."""

from mra_kernels.ops._operator import REGISTRY as OPS
from mra_kernels.ops.adapter_gate import adapter_gate
from mra_kernels.ops.add_norm import add_norm
from mra_kernels.ops.attention import attention
from mra_kernels.ops.depthwise_conv_gelu import depthwise_conv_gelu
from mra_kernels.ops.depthwise_conv_norm import depthwise_conv_norm
from mra_kernels.ops.gated_projection_add import gated_projection_add
from mra_kernels.ops.gated_resample_add import gated_resample_add
from mra_kernels.ops.linear_gelu import linear_gelu
from mra_kernels.ops.linear_scale_residual import linear_scale_residual
from mra_kernels.ops.norm_patchify import norm_patchify
from mra_kernels.ops.patch_conv_norm import patch_conv_norm
from mra_kernels.ops.project_mean import project_mean

__all__ = [
    "OPS",
    "adapter_gate",
    "add_norm",
    "attention",
    "depthwise_conv_gelu",
    "depthwise_conv_norm",
    "gated_projection_add",
    "gated_resample_add",
    "linear_gelu",
    "linear_scale_residual",
    "norm_patchify",
    "patch_conv_norm",
    "project_mean",
]
