"""Fused kernels for mixture-of-resolution vision-language models.

The twelve ops of `mra_kernels.ops` are plain functions over channels-last tensors; `mra_kernels.modules` binds them to
parameters, and `apply_mra_kernels` puts them into models that others made. `build_info()` works without torch, so that
a wheel can be inspected where torch is not installed.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING or find_spec("torch") is not None:
    from mra_kernels.dispatch import BackendUnavailable, backend_report, use_backend
    from mra_kernels.ops import (
        adapter_gate,
        add_norm,
        attention,
        depthwise_conv_gelu,
        depthwise_conv_norm,
        gated_projection_add,
        gated_resample_add,
        linear_gelu,
        linear_scale_residual,
        norm_patchify,
        patch_conv_norm,
        project_mean,
    )
    from mra_kernels.patching import apply_mra_kernels
else:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise ImportError(f"mra_kernels.{name} needs torch, which is not installed: pip install 'torch>=2.11'")
        raise AttributeError(f"module 'mra_kernels' has no attribute {name!r}")


def build_info() -> dict[str, Any]:
    """What the compiled extension holds: version, compiler, CPU instruction sets, CUDA version and architectures.

    Raises:
        ImportError: the extension is absent or does not load.
    """
    return import_module("mra_kernels._C").build_info()


__all__ = [
    "BackendUnavailable",
    "adapter_gate",
    "add_norm",
    "apply_mra_kernels",
    "attention",
    "backend_report",
    "build_info",
    "depthwise_conv_gelu",
    "depthwise_conv_norm",
    "gated_projection_add",
    "gated_resample_add",
    "linear_gelu",
    "linear_scale_residual",
    "norm_patchify",
    "patch_conv_norm",
    "project_mean",
    "use_backend",
]
