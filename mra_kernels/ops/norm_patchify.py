"""`norm_patchify`: the first half of a ConvNeXt downsample, laid out so that one matrix product finishes it."""

from torch import Tensor

from mra_kernels.native import norm_patchify as native
from mra_kernels.ops._operator import Operator, accumulator_dtype, check_map, check_shape
from mra_kernels.reference.norm_patchify import norm_patchify as reference
from mra_kernels.triton._support import backend as triton_backend


def norm_patchify(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the channels, written as rows of 2x2 patches (the ConvNeXt downsample before its product).

    Args:
        x: [B, H, W, C], channels last; an odd last row or column is ignored, as a stride-2 convolution ignores it.
        norm_weight, norm_bias: [C].
        eps: added to the variance.

    Returns:
        [B, H // 2, W // 2, 4 * C]; a row is ordered (dy, dx, c), which fits a weight [N, 2, 2, C].

    Raises:
        ValueError: shapes that do not fit, or a map without one whole patch.
        TypeError: tensors of different dtypes.
    """
    return _OP(x, norm_weight, norm_bias, eps)


def _check(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> None:
    check_map("norm_patchify", "x", x)
    if x.shape[1] < 2 or x.shape[2] < 2:
        raise ValueError(f"norm_patchify: x of shape {tuple(x.shape)} has no whole 2x2 patch")
    check_shape("norm_patchify", "norm_weight", norm_weight, (x.shape[3],))
    check_shape("norm_patchify", "norm_bias", norm_bias, (x.shape[3],))


def _fake(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, height, width, channels = x.shape
    statistic = x.new_empty((batch, height, width), dtype=accumulator_dtype(x.dtype))
    patches = x.new_empty((batch, height // 2, width // 2, 4 * channels))
    return patches, statistic, statistic.new_empty(statistic.shape)


_OP = Operator(
    "norm_patchify",
    forward="(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, str backend)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    backward="(Tensor grad_y, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor mean, Tensor rstd, float eps,"
    " bool[] needs, str backend) -> (Tensor grad_x, Tensor grad_norm_weight, Tensor grad_norm_bias)",
    reference=reference,
    fake=_fake,
    check=_check,
    backends={"native": native.BACKEND, "triton": triton_backend("norm_patchify")},
)
