"""`depthwise_conv_gelu`: the MR-Adapter's low path up to its projection, with the means that its gate needs."""

from torch import Tensor

from mra_kernels.native import depthwise_conv_gelu as native
from mra_kernels.ops._operator import Operator, accumulator_dtype, check_map, check_shape
from mra_kernels.reference.depthwise_conv_gelu import depthwise_conv_gelu as reference
from mra_kernels.triton._support import backend as triton_backend


def depthwise_conv_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Depthwise 7x7 convolution with zero padding 3, plus bias, then GELU(erf) (MR-Adapter, arXiv 2403.03003 eq. 4).

    Args:
        x: [B, H, W, C], channels last.
        weight: [C, 1, 7, 7].
        bias: [C].

    Returns:
        y: [B, H, W, C]; the means over the picture of `y` and of `x`: [B, C] each, float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit.
        TypeError: tensors of different dtypes.
    """
    return _OP(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_map("depthwise_conv_gelu", "x", x)
    check_shape("depthwise_conv_gelu", "weight", weight, (x.shape[3], 1, 7, 7))
    check_shape("depthwise_conv_gelu", "bias", bias, (x.shape[3],))


def _fake(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], x.shape[3]), dtype=accumulator_dtype(x.dtype))
    return x.new_empty(x.shape), mean, mean.new_empty(mean.shape)


_OP = Operator(
    "depthwise_conv_gelu",
    forward="(Tensor x, Tensor weight, Tensor bias, str backend) -> (Tensor y, Tensor y_mean, Tensor x_mean)",
    backward="(Tensor? grad_y, Tensor? grad_y_mean, Tensor? grad_x_mean, Tensor x, Tensor weight, Tensor bias,"
    " bool[] needs, str backend) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    reference=reference,
    fake=_fake,
    check=_check,
    backends={"native": native.BACKEND, "triton": triton_backend("depthwise_conv_gelu")},
    public=3,
)
