"""`attention`: every query against every key of its picture, without scores in memory."""

from torch import Tensor

from mra_kernels.native import attention as native
from mra_kernels.ops._operator import Operator, accumulator_dtype
from mra_kernels.reference.attention import attention as reference


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale * query key^T) value for each head (Vaswani et al. 2017, equation 1), without a mask.

    Views of one product for query, key and value are read in place.

    Args:
        query: [B, L, H, D], H heads of D channels.
        key, value: [B, M, H, D].
        scale: of the scores; 1 / sqrt(D) without it.

    Returns:
        [B, L, H, D].

    Raises:
        ValueError: shapes that do not fit, or no keys.
        TypeError: tensors of different dtypes.
    """
    return _OP(query, key, value, scale)


def _check(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"attention: {name} must be [B, rows, H, D], but has shape {tuple(tensor.shape)}")
    batch, _, heads, channels = query.shape
    rows = key.shape[1]
    for name, tensor in (("key", key), ("value", value)):
        expected = (batch, rows, heads, channels)
        if tensor.shape != expected:
            raise ValueError(
                f"attention: {name} has shape {tuple(tensor.shape)}, but must be {expected} beside query of "
                f"{tuple(query.shape)} and key of {tuple(key.shape)}"
            )
    if rows == 0 or channels == 0:
        raise ValueError(f"attention: key of {tuple(key.shape)} has no {'channels' if rows else 'rows'} to attend to")


def _fake(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, rows), dtype=accumulator_dtype(query.dtype))


_OP = Operator(
    "attention",
    forward="(Tensor query, Tensor key, Tensor value, float? scale, str backend) -> (Tensor y, Tensor logsumexp)",
    backward="(Tensor grad_y, Tensor query, Tensor key, Tensor value, Tensor y, Tensor logsumexp, float? scale,"
    " bool[] needs, str backend) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    reference=reference,
    fake=_fake,
    check=_check,
    backends={
        "native": native.BACKEND,
        "triton": "no Triton kernel: the library has flash attention on a GPU",
    },
)
