"""`adapter_gate`: one scalar a picture, from the means of both pathways."""

from torch import Tensor

from mra_kernels.ops._operator import Operator, check_shape
from mra_kernels.reference.adapter_gate import adapter_gate as reference
from mra_kernels.triton._support import backend as triton_backend


def adapter_gate(
    low_mean: Tensor, high_mean: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, down_bias: Tensor
) -> Tensor:
    """tanh(W2 GELU(W1 [low_mean, high_mean] + b1) + b2), computed in float32 (MR-Adapter, arXiv 2403.03003 eq. 5).

    Args:
        low_mean, high_mean: [B, C], float32 (float64 for float64): means over the tokens of a picture.
        up_weight, up_bias: [D, 2 * C], [D].
        down_weight, down_bias: [1, D], [1].

    Returns:
        [B], in the dtype of the means.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: tensors of different dtypes.
    """
    return _OP(low_mean, high_mean, up_weight, up_bias, down_weight, down_bias)


def _check(
    low_mean: Tensor, high_mean: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, down_bias: Tensor
) -> None:
    op = "adapter_gate"
    if low_mean.dim() != 2:
        raise ValueError(f"{op}: low_mean must be [B, C], but has shape {tuple(low_mean.shape)}")
    check_shape(op, "high_mean", high_mean, tuple(low_mean.shape))
    if up_weight.dim() != 2 or up_weight.shape[1] != 2 * low_mean.shape[1]:
        raise ValueError(
            f"{op}: up_weight has shape {tuple(up_weight.shape)}, but must be [D, {2 * low_mean.shape[1]}]"
        )
    check_shape(op, "up_bias", up_bias, (up_weight.shape[0],))
    check_shape(op, "down_weight", down_weight, (1, up_weight.shape[0]))
    check_shape(op, "down_bias", down_bias, (1,))


def _fake(
    low_mean: Tensor, high_mean: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, down_bias: Tensor
) -> Tensor:
    return low_mean.new_empty((low_mean.shape[0],))


_OP = Operator(
    "adapter_gate",
    forward="(Tensor low_mean, Tensor high_mean, Tensor up_weight, Tensor up_bias, Tensor down_weight,"
    " Tensor down_bias, str backend) -> (Tensor gate)",
    backward="(Tensor grad_gate, Tensor low_mean, Tensor high_mean, Tensor up_weight, Tensor up_bias,"
    " Tensor down_weight, Tensor down_bias, bool[] needs, str backend) -> (Tensor grad_low_mean,"
    " Tensor grad_high_mean, Tensor grad_up_weight, Tensor grad_up_bias, Tensor grad_down_weight,"
    " Tensor grad_down_bias)",
    reference=reference,
    fake=_fake,
    check=_check,
    backends={"native": "no native kernel yet", "triton": triton_backend("adapter_gate")},
    wide=("low_mean", "high_mean"),
)
