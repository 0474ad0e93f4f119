"""`patch_conv_norm`: the stem, from pixels to a normalised channels-last map."""

from torch import Tensor

from mra_kernels.native import patch_conv_norm as native
from mra_kernels.ops._operator import Operator, accumulator_dtype, check_shape
from mra_kernels.reference.patch_conv_norm import patch_conv_norm as reference
from mra_kernels.triton._support import backend as triton_backend


def patch_conv_norm(
    pixels: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-6
) -> Tensor:
    """Convolution k x k with stride k, plus bias, then LayerNorm over the channels (the ConvNeXt stem).

    Args:
        pixels: [B, P, S1, S2], channels first; rows and columns past the last whole patch are ignored.
        weight: [C, P, k, k].
        bias, norm_weight, norm_bias: [C].
        eps: added to the variance.

    Returns:
        [B, S1 // k, S2 // k, C], channels last.

    Raises:
        ValueError: shapes that do not fit, or a picture smaller than one patch.
        TypeError: tensors of different dtypes.
    """
    return _OP(pixels, weight, bias, norm_weight, norm_bias, eps)


def _check(pixels: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> None:
    op = "patch_conv_norm"
    if pixels.dim() != 4:
        raise ValueError(f"{op}: pixels must be [B, P, S1, S2], but have shape {tuple(pixels.shape)}")
    if weight.dim() != 4 or weight.shape[1] != pixels.shape[1] or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, but must be [C, {pixels.shape[1]}, k, k] "
            f"for pixels of shape {tuple(pixels.shape)}"
        )
    if pixels.shape[2] < weight.shape[2] or pixels.shape[3] < weight.shape[3]:
        raise ValueError(f"{op}: a picture of {tuple(pixels.shape[2:])} is smaller than a patch of {weight.shape[2]}")
    for name, tensor in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_shape(op, name, tensor, (weight.shape[0],))


def _fake(
    pixels: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    k = weight.shape[2]
    grid = (pixels.shape[0], pixels.shape[2] // k, pixels.shape[3] // k)
    statistic = pixels.new_empty(grid, dtype=accumulator_dtype(pixels.dtype))
    return pixels.new_empty((*grid, weight.shape[0])), statistic, statistic.new_empty(grid)


_OP = Operator(
    "patch_conv_norm",
    forward="(Tensor pixels, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float eps, str backend)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    backward="(Tensor grad_y, Tensor pixels, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias,"
    " Tensor mean, Tensor rstd, float eps, bool[] needs, str backend) -> (Tensor grad_pixels, Tensor grad_weight,"
    " Tensor grad_bias, Tensor grad_norm_weight, Tensor grad_norm_bias)",
    reference=reference,
    fake=_fake,
    check=_check,
    backends={
        "native": native.BACKEND,
        "triton": triton_backend("patch_conv_norm"),
    },
)
