"""`linear_scale_residual`: a linear layer, its layer scale and the residual sum."""

from torch import Tensor

from mra_kernels.native import linear_scale_residual as native
from mra_kernels.ops._operator import Operator, check_shape
from mra_kernels.reference.linear_scale_residual import linear_scale_residual as reference
from mra_kernels.triton._support import backend as triton_backend


def linear_scale_residual(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, residual: Tensor) -> Tensor:
    """residual + scale * (x W^T + b) (the ConvNeXt block's second half, with its layer scale).

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N].
        scale: [N], or None for 1.
        residual: [..., N].

    Returns:
        [..., N].

    Raises:
        ValueError: shapes that do not fit.
        TypeError: tensors of different dtypes.
    """
    return _OP(x, weight, bias, scale, residual)


def _check(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, residual: Tensor) -> None:
    op = "linear_scale_residual"
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be [..., K], but has no dimension")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, but must be [N, {x.shape[-1]}] for x of {tuple(x.shape)}"
        )
    check_shape(op, "bias", bias, (weight.shape[0],))
    if scale is not None:
        check_shape(op, "scale", scale, (weight.shape[0],))
    check_shape(op, "residual", residual, (*x.shape[:-1], weight.shape[0]))


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, residual: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, x.new_empty(y.shape if keep and scale is not None else 0)


_OP = Operator(
    "linear_scale_residual",
    forward="(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor residual, bool keep, str backend)"
    " -> (Tensor y, Tensor product)",
    backward="(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor product,"
    " bool[] needs, str backend) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_scale)",
    reference=reference,
    fake=_fake,
    check=_check,
    backends={"native": native.BACKEND, "triton": triton_backend("linear_scale_residual")},
    added="residual",
)
