"""`depthwise_conv_norm` in Triton: the convolution writes the map, and a second small kernel normalizes it in place.

One program cannot own all channels of a tile large enough for the convolution; at B = 1 the map between the two kernels
stays in the L2 cache. Backward computes the convolution again, turns it into the gradient of its output in place, and
convolves that with flipped taps. Bytes and FLOPs: see `_depthwise`, `_depthwise_gradients` and `_layer_norm`.
"""

from collections.abc import Sequence

from torch import Tensor

from mra_kernels.triton._depthwise import convolve, spread_taps
from mra_kernels.triton._depthwise_gradients import parameter_gradients
from mra_kernels.triton._layer_norm import layer_norm, layer_norm_backward


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x: [B, H, W, C] -> y: [B, H, W, C], mean and rstd of the convolution's output: [B, H, W], float32."""
    x, weight, bias, norm_weight, norm_bias = (t.contiguous() for t in (x, weight, bias, norm_weight, norm_bias))
    y = convolve(x, spread_taps(weight), bias)
    return y, *layer_norm(y, norm_weight, norm_bias, eps, y)


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias, norm_weight and norm_bias; empty where `needs` says no."""
    grad_y, x, weight, bias, norm_weight = (t.contiguous() for t in (grad_y, x, weight, bias, norm_weight))
    grad_x = grad_weight = x.new_empty(0)
    taps = spread_taps(weight)
    conv = convolve(x, taps, bias)
    inner = conv if needs[0] or needs[1] else None
    vectors = layer_norm_backward(
        grad_y, conv, norm_weight, (mean, rstd), eps, inner, needs=(needs[3], needs[4], needs[2])
    )
    if needs[0]:
        grad_x = convolve(conv, taps, flipped=True)
    if needs[1]:
        grad_weight = parameter_gradients(x, conv, weight)[0]
    grad_norm_weight, grad_norm_bias, grad_bias = vectors
    return grad_x, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias
