"""`depthwise_conv_norm`: the first half of a ConvNeXt block in one pass over the map."""

from torch import Tensor

from mra_kernels.native import depthwise_conv_norm as native
from mra_kernels.ops._operator import Operator, accumulator_dtype, check_map, check_shape
from mra_kernels.reference.depthwise_conv_norm import depthwise_conv_norm as reference
from mra_kernels.triton._support import backend as triton_backend


def depthwise_conv_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-6
) -> Tensor:
    """Depthwise 7x7 convolution with zero padding 3, plus bias, then LayerNorm over the channels (ConvNeXt block).

    Args:
        x: [B, H, W, C], channels last.
        weight: [C, 1, 7, 7].
        bias, norm_weight, norm_bias: [C].
        eps: added to the variance.

    Returns:
        [B, H, W, C]. A NaN or infinity in `x` reaches the 7x7 positions around it, all channels, and nothing else.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: tensors of different dtypes.
    """
    return _OP(x, weight, bias, norm_weight, norm_bias, eps)


def _check(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> None:
    op = "depthwise_conv_norm"
    check_map(op, "x", x)
    check_shape(op, "weight", weight, (x.shape[3], 1, 7, 7))
    for name, tensor in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_shape(op, name, tensor, (x.shape[3],))


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    statistic = x.new_empty(x.shape[:3], dtype=accumulator_dtype(x.dtype))
    return x.new_empty(x.shape), statistic, statistic.new_empty(x.shape[:3])


_OP = Operator(
    "depthwise_conv_norm",
    forward="(Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float eps, str backend)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    backward="(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias,"
    " Tensor mean, Tensor rstd, float eps, bool[] needs, str backend) -> (Tensor grad_x, Tensor grad_weight,"
    " Tensor grad_bias, Tensor grad_norm_weight, Tensor grad_norm_bias)",
    reference=reference,
    fake=_fake,
    check=_check,
    backends={"native": native.BACKEND, "triton": triton_backend("depthwise_conv_norm")},
)
