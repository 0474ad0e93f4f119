"""`linear_gelu`: a linear layer with GELU, and optionally a weighted mean of its output per picture."""

import math
from typing import overload

from torch import Tensor

from mra_kernels.native import linear_gelu as native
from mra_kernels.ops._operator import Operator, accumulator_dtype, check_shape
from mra_kernels.reference.linear_gelu import linear_gelu as reference
from mra_kernels.triton._support import backend as triton_backend


@overload
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, mean_weights: None = None) -> Tensor: ...


@overload
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, mean_weights: Tensor) -> tuple[Tensor, Tensor]: ...


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, mean_weights: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """GELU(x W^T + b), exact erf (the ConvNeXt MLP's first half; the MR-Adapter's high path).

    Args:
        x: [B, ..., K].
        weight: [N, K].
        bias: [N].
        mean_weights: [L], one weight for each position of a picture (L is the product of the middle dimensions),
            float32 (float64 for float64). The gradient does not flow into it.

    Returns:
        y: [B, ..., N]; with `mean_weights` also sum_l mean_weights[l] * y[b, l]: [B, N] in its dtype.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: tensors of different dtypes.
    """
    outputs = _OP(x, weight, bias, mean_weights)
    if mean_weights is not None or isinstance(outputs, Tensor):
        return outputs
    return outputs[0]


def _check(x: Tensor, weight: Tensor, bias: Tensor, mean_weights: Tensor | None) -> None:
    op = "linear_gelu"
    if x.dim() < 2:
        raise ValueError(f"{op}: x must be [B, ..., K], but has shape {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, but must be [N, {x.shape[-1]}] for x of {tuple(x.shape)}"
        )
    check_shape(op, "bias", bias, (weight.shape[0],))
    if mean_weights is not None:
        if x.dim() < 3:
            raise ValueError(f"{op}: mean_weights need positions: x must be [B, L, K], but has shape {tuple(x.shape)}")
        check_shape(op, "mean_weights", mean_weights, (math.prod(x.shape[1:-1]),))


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, mean_weights: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    product = x.new_empty(y.shape if keep else 0)
    if mean_weights is None:
        return y, x.new_empty(0), product
    return y, x.new_empty((x.shape[0], weight.shape[0]), dtype=accumulator_dtype(x.dtype)), product


_OP = Operator(
    "linear_gelu",
    forward="(Tensor x, Tensor weight, Tensor bias, Tensor? mean_weights, bool keep, str backend)"
    " -> (Tensor y, Tensor y_mean, Tensor product)",
    backward="(Tensor? grad_y, Tensor? grad_y_mean, Tensor x, Tensor weight, Tensor bias, Tensor? mean_weights,"
    " Tensor product, bool[] needs, str backend) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    reference=reference,
    fake=_fake,
    check=_check,
    backends={"native": native.BACKEND, "triton": triton_backend("linear_gelu")},
    public=2,
    wide=("mean_weights",),
)
