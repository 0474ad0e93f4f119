"""`gated_resample_add`: the MR-Adapter's last step, which brings the high-resolution map into the low one."""

from torch import Tensor

from mra_kernels.native import gated_resample_add as native
from mra_kernels.ops._operator import Operator, check_map, check_shape
from mra_kernels.reference.gated_resample_add import gated_resample_add as reference
from mra_kernels.triton._support import backend as triton_backend


def gated_resample_add(low: Tensor, high: Tensor, gate: Tensor) -> Tensor:
    """low + gate * resample(high) (MR-Adapter, arXiv 2403.03003 eq. 3).

    `high` is averaged over whole windows where it is larger than `low`, taken as it is on the same grid, and
    interpolated bilinearly with aligned corners where it is smaller.

    Args:
        low: [B, H, W, C], channels last.
        high: [B, H', W', C]; either H' and W' are multiples of H and W, or H' <= H and W' <= W.
        gate: [B], one scalar a picture, float32 (float64 for float64).

    Returns:
        [B, H, W, C]. A NaN in `high` reaches the positions that read it, those with weight zero included.

    Raises:
        ValueError: shapes that do not fit, or a grid that divides into no whole windows.
        TypeError: tensors of different dtypes.
    """
    return _OP(low, high, gate)


def _check(low: Tensor, high: Tensor, gate: Tensor) -> None:
    op = "gated_resample_add"
    check_map(op, "low", low)
    check_map(op, "high", high)
    batch, _, _, channels = low.shape
    if high.shape[0] != batch or high.shape[3] != channels:
        raise ValueError(
            f"{op}: high has shape {tuple(high.shape)}, but must be [{batch}, H', W', {channels}] beside low"
        )
    check_grids(op, low, high)
    check_shape(op, "gate", gate, (batch,))


def check_grids(op: str, low: Tensor, high: Tensor) -> None:
    """Raises unless the grid of `high`: [B, H', W', C'] can be brought to that of `low`: [B, H, W, C]."""
    height, width = low.shape[1:3]
    smaller = high.shape[1] <= height and high.shape[2] <= width
    if not smaller and (high.shape[1] % height != 0 or high.shape[2] % width != 0):
        raise ValueError(
            f"{op}: a high-resolution grid of {tuple(high.shape[1:3])} cannot be pooled to {(height, width)}: "
            f"both sides must be multiples; resize one of the maps first"
        )


def _fake(low: Tensor, high: Tensor, gate: Tensor) -> Tensor:
    return low.new_empty(low.shape)


_OP = Operator(
    "gated_resample_add",
    forward="(Tensor low, Tensor high, Tensor gate, str backend) -> (Tensor y)",
    backward="(Tensor grad_y, Tensor high, Tensor gate, bool[] needs, str backend)"
    " -> (Tensor grad_high, Tensor grad_gate)",
    reference=reference,
    fake=_fake,
    check=_check,
    backends={"native": native.BACKEND, "triton": triton_backend("gated_resample_add")},
    wide=("gate",),
    added="low",
)
