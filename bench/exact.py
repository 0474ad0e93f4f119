"""The ops in float64, for errors: the reference itself, but with a depthwise convolution that a CPU can afford.

PyTorch has no fast depthwise convolution in float64: at 256 x 256 x 192 it takes 3 s on two cores, and its gradients
4.5 s. Tap by tap, on rows that stay in cache, it is 0.2 s each. On a GPU the same code serves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mra_kernels.ops import OPS

# Elements of a band of rows: 4 MiB in float64.
BAND = 1 << 19


def exact_op(op: str) -> Callable[..., Any]:
    """The op with the arguments and public outputs of its reference; give it float64."""
    return _WITH_DEPTHWISE.get(op, OPS[op].reference)


@contextmanager
def affordable_modules() -> Iterator[None]:
    """Inside the block, ConvNeXt blocks in float64 that run on backend `reference` take the convolution from here."""
    op = OPS["depthwise_conv_norm"]
    before, op.reference = op.reference, _depthwise_conv_norm
    try:
        yield
    finally:
        op.reference = before


def _depthwise_conv_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    y = _Depthwise.apply(x, weight) + bias
    return F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, eps)


def _depthwise_conv_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = F.gelu(_Depthwise.apply(x, weight) + bias)
    return y, y.mean((1, 2)), x.mean((1, 2))


_WITH_DEPTHWISE: dict[str, Callable[..., Any]] = {
    "depthwise_conv_gelu": _depthwise_conv_gelu,
    "depthwise_conv_norm": _depthwise_conv_norm,
}


class _Depthwise(torch.autograd.Function):
    """Depthwise 7x7 with zero padding 3. x: [B, H, W, C], weight: [C, 1, 7, 7] -> [B, H, W, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """x: [B, H, W, C], weight: [C, 1, 7, 7] -> [B, H, W, C]."""
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight.flatten(1).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """grad: [B, H, W, C] -> [B, H, W, C], [C, 1, 7, 7]."""
        x, weight = ctx.saved_tensors
        grad_taps = x.new_zeros(49, x.shape[3])
        for padded, rows in _bands(x, grad):
            for tap, window in enumerate(_windows(padded, rows)):
                grad_taps[tap] += (window * rows).sum((0, 1))
        # A correlation's input gradient is the correlation with the taps in the opposite order.
        return _convolve(grad, weight.flatten(1).flip(1).t()), grad_taps.t().reshape(weight.shape)


def _convolve(x: Tensor, taps: Tensor) -> Tensor:
    """x: [B, H, W, C], taps: [49, C] -> [B, H, W, C]."""
    y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for padded, rows in _bands(x, y):
        for tap, window in enumerate(_windows(padded, rows)):
            rows.addcmul_(window, taps[tap])
    return y


def _bands(x: Tensor, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of `x` with what lies around them, [h + 6, W + 6, C], and the same rows of `like`: [h, W, C]."""
    height = max(1, BAND // (x.shape[2] * x.shape[3]))
    for picture, target in zip(F.pad(x, (0, 0, 3, 3, 3, 3)), like, strict=True):
        for row in range(0, x.shape[1], height):
            rows = target[row : row + height]
            yield picture[row : row + len(rows) + 6], rows


def _windows(padded: Tensor, rows: Tensor) -> Iterator[Tensor]:
    """padded: [h + 6, W + 6, C], rows: [h, W, C] -> for each of the 49 taps what it meets: [h, W, C]."""
    height, width = rows.shape[:2]
    for row in range(7):
        for column in range(7):
            yield padded[row : row + height, column : column + width]
