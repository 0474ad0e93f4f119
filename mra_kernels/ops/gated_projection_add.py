"""`gated_projection_add`: both projections of the MR-Adapter, its gate and its residual, on one grid."""

from torch import Tensor

from mra_kernels.ops._operator import Operator, check_shape
from mra_kernels.reference.gated_projection_add import gated_projection_add as reference
from mra_kernels.triton._support import backend as triton_backend


def gated_projection_add(
    low: Tensor,
    low_hidden: Tensor,
    low_weight: Tensor,
    low_bias: Tensor,
    high_hidden: Tensor,
    high_weight: Tensor,
    high_bias: Tensor,
    gate: Tensor,
) -> Tensor:
    """low + (l W_l^T + b_l) + gate * (h W_h^T + b_h) (MR-Adapter, arXiv 2403.03003 eq. 3 and 4, on one grid).

    Args:
        low: [B, ..., N].
        low_hidden: l, [B, ..., K_l].
        low_weight, low_bias: [N, K_l], [N].
        high_hidden: h, [B, ..., K_h], on the grid of `low`.
        high_weight, high_bias: [N, K_h], [N].
        gate: [B], one scalar a picture, float32 (float64 for float64).

    Returns:
        [B, ..., N].

    Raises:
        ValueError: shapes that do not fit.
        TypeError: tensors of different dtypes.
    """
    return _OP(low, low_hidden, low_weight, low_bias, high_hidden, high_weight, high_bias, gate)


def _check(
    low: Tensor,
    low_hidden: Tensor,
    low_weight: Tensor,
    low_bias: Tensor,
    high_hidden: Tensor,
    high_weight: Tensor,
    high_bias: Tensor,
    gate: Tensor,
) -> None:
    op = "gated_projection_add"
    if low.dim() < 2:
        raise ValueError(f"{op}: low must be [B, ..., N], but has shape {tuple(low.shape)}")
    paths = (("low", low_hidden, low_weight, low_bias), ("high", high_hidden, high_weight, high_bias))
    for path, hidden, weight, bias in paths:
        check_shape(op, f"{path}_hidden", hidden, (*low.shape[:-1], *hidden.shape[-1:]))
        check_shape(op, f"{path}_weight", weight, (low.shape[-1], hidden.shape[-1]))
        check_shape(op, f"{path}_bias", bias, (low.shape[-1],))
    check_shape(op, "gate", gate, (low.shape[0],))


def _fake(
    low: Tensor,
    low_hidden: Tensor,
    low_weight: Tensor,
    low_bias: Tensor,
    high_hidden: Tensor,
    high_weight: Tensor,
    high_bias: Tensor,
    gate: Tensor,
) -> Tensor:
    return low.new_empty(low.shape)


_OP = Operator(
    "gated_projection_add",
    forward="(Tensor low, Tensor low_hidden, Tensor low_weight, Tensor low_bias, Tensor high_hidden,"
    " Tensor high_weight, Tensor high_bias, Tensor gate, str backend) -> (Tensor y)",
    backward="(Tensor grad_y, Tensor low_hidden, Tensor low_weight, Tensor low_bias, Tensor high_hidden,"
    " Tensor high_weight, Tensor high_bias, Tensor gate, bool[] needs, str backend)"
    " -> (Tensor grad_low_hidden, Tensor grad_low_weight, Tensor grad_low_bias, Tensor grad_high_hidden,"
    " Tensor grad_high_weight, Tensor grad_high_bias, Tensor grad_gate)",
    reference=reference,
    fake=_fake,
    check=_check,
    backends={
        "native": "no native kernel yet: two library products and a sum",
        "triton": triton_backend("gated_projection_add"),
    },
    wide=("gate",),
    added="low",
)
