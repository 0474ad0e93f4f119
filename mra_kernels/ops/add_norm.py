"""`add_norm`: what a pre-norm transformer does between two of its products, in one pass over the tokens."""

from torch import Tensor

from mra_kernels.ops._operator import Operator, accumulator_dtype, check_shape
from mra_kernels.reference.add_norm import add_norm as reference
from mra_kernels.triton._support import backend as triton_backend


def add_norm(
    x: Tensor, delta: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The sum of the residual stream and a block's result, and its LayerNorm, which the next block reads.

    Args:
        x: [..., C], the residual stream.
        delta: [..., C], what is added to it.
        norm_weight, norm_bias: [C].
        eps: added to the variance.

    Returns:
        x + delta, rounded to their dtype, and the LayerNorm over the channels of that: both [..., C].

    Raises:
        ValueError: shapes that do not fit.
        TypeError: tensors of different dtypes.
    """
    return _OP(x, delta, norm_weight, norm_bias, eps)


def _check(x: Tensor, delta: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> None:
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"add_norm: x must be [..., C] with a channel or more, but has shape {tuple(x.shape)}")
    check_shape("add_norm", "delta", delta, tuple(x.shape))
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_shape("add_norm", name, tensor, (x.shape[-1],))


def _fake(
    x: Tensor, delta: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistic = x.new_empty(x.shape[:-1], dtype=accumulator_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape), statistic, statistic.new_empty(statistic.shape)


_OP = Operator(
    "add_norm",
    forward="(Tensor x, Tensor delta, Tensor norm_weight, Tensor norm_bias, float eps, str backend)"
    " -> (Tensor sum, Tensor y, Tensor mean, Tensor rstd)",
    backward="(Tensor grad_sum, Tensor grad_y, Tensor sum, Tensor norm_weight, Tensor norm_bias, Tensor mean,"
    " Tensor rstd, float eps, bool[] needs, str backend) -> (Tensor grad_x, Tensor grad_norm_weight,"
    " Tensor grad_norm_bias)",
    reference=reference,
    fake=_fake,
    check=_check,
    backends={
        "native": "no native kernel: on a CPU the library adds in the epilogue of the product before",
        "triton": triton_backend("add_norm"),
    },
    public=2,
    summed=("x", "delta"),
)
