"""`depthwise_conv_gelu` in Triton: GELU and the sums for both means are in the convolution's registers.

The means are summed over a tile, then over tiles in a fixed order. Backward computes the convolution again with the
derivative of GELU behind it, and convolves that with flipped taps. Bytes and FLOPs: see `_depthwise` and
`_depthwise_gradients`.
"""

from collections.abc import Sequence

from torch import Tensor

from mra_kernels.triton._depthwise import convolve, convolve_gelu, convolve_gelu_backward, spread_taps
from mra_kernels.triton._depthwise_gradients import parameter_gradients


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x: [B, H, W, C] -> y: [B, H, W, C], and the means of `y` and `x` over each picture: [B, C], float32."""
    return convolve_gelu(x.contiguous(), spread_taps(weight), bias.contiguous())


def backward(
    grad_y: Tensor | None,
    grad_y_mean: Tensor | None,
    grad_x_mean: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight and bias; empty where `needs` says no."""
    grad_y, grad_y_mean, grad_x_mean = (
        None if g is None else g.contiguous() for g in (grad_y, grad_y_mean, grad_x_mean)
    )
    x, bias = x.contiguous(), bias.contiguous()
    grad_x = grad_weight = grad_bias = x.new_empty(0)
    taps = spread_taps(weight)
    if grad_y is None and grad_y_mean is None:
        grad_conv = x.new_zeros(x.shape)
    else:
        grad_conv = convolve_gelu_backward(x, taps, bias, grad_y, grad_y_mean)
    if needs[0]:
        grad_x = convolve(grad_conv, taps, constant=grad_x_mean, flipped=True)
    if needs[1] or needs[2]:
        grad_weight, grad_bias = parameter_gradients(x, grad_conv, weight)
    return grad_x, grad_weight if needs[1] else x.new_empty(0), grad_bias if needs[2] else x.new_empty(0)
