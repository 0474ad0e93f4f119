"""`project_mean`: the mean of a projection's result, from the mean of what it reads."""

from torch import Tensor

from mra_kernels.ops._operator import Operator, check_shape
from mra_kernels.reference.project_mean import project_mean as reference
from mra_kernels.triton._support import backend as triton_backend


def project_mean(hidden_mean: Tensor, weight: Tensor, bias: Tensor, base_mean: Tensor | None = None) -> Tensor:
    """base_mean + hidden_mean W^T + b, computed in float32: what the MR-Adapter's gate reads (arXiv 2403.03003 eq. 5).

    Args:
        hidden_mean: [B, K], float32 (float64 for float64): the means over the tokens of a picture.
        weight: [N, K].
        bias: [N].
        base_mean: [B, N], in the dtype of the means, of what the projection's result is added to; None for nothing.

    Returns:
        [B, N], in the dtype of the means.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: tensors of different dtypes.
    """
    return _OP(hidden_mean, weight, bias, base_mean)


def _check(hidden_mean: Tensor, weight: Tensor, bias: Tensor, base_mean: Tensor | None) -> None:
    op = "project_mean"
    if hidden_mean.dim() != 2 or hidden_mean.shape[1] == 0:
        raise ValueError(f"{op}: hidden_mean must be [B, K], but has shape {tuple(hidden_mean.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden_mean.shape[1]:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, but must be [N, {hidden_mean.shape[1]}]")
    check_shape(op, "bias", bias, (weight.shape[0],))
    if base_mean is not None:
        check_shape(op, "base_mean", base_mean, (hidden_mean.shape[0], weight.shape[0]))


def _fake(hidden_mean: Tensor, weight: Tensor, bias: Tensor, base_mean: Tensor | None) -> Tensor:
    return hidden_mean.new_empty((hidden_mean.shape[0], weight.shape[0]))


_OP = Operator(
    "project_mean",
    forward="(Tensor hidden_mean, Tensor weight, Tensor bias, Tensor? base_mean, str backend) -> (Tensor y)",
    backward="(Tensor grad_y, Tensor hidden_mean, Tensor weight, Tensor bias, bool[] needs, str backend)"
    " -> (Tensor grad_hidden_mean, Tensor grad_weight, Tensor grad_bias)",
    reference=reference,
    fake=_fake,
    check=_check,
    backends={
        "native": "no native kernel: one product with a row a picture is the library's",
        "triton": triton_backend("project_mean"),
    },
    wide=("hidden_mean", "base_mean"),
    added="base_mean",
)
