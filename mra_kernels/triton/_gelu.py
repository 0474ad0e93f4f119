"""GELU with the exact error function, and its derivative, in float32 registers."""

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def gelu(x, dtype: tl.constexpr):
    """x: float32 -> x Phi(x) in float32, as accurate as storing it as `dtype` needs.

    For 16 bits Phi(x) is 1 / (1 + exp2(x Q(x^2))), half the instructions of the error function: a result of 0.001 and
    more is within 2e-5 relative, a smaller one within 2e-8. `csrc/common/gelu.cuh` has the same Q.
    """
    if dtype.primitive_bitwidth == 16:
        s = x * x
        q = -3.494021961e-09 * s + 2.877891916e-07
        q = q * s - 9.393822438e-06
        q = q * s + 1.389645186e-04
        q = q * s + 1.926349796e-04
        q = q * s - 1.050364375e-01
        q = q * s - 2.302086830e00
        return x / (1.0 + tl.exp2(x * q))
    else:
        return x * _normal_cdf(x)


@triton.jit
def gelu_derivative(x):
    """x: float32 -> Phi(x) + x phi(x), the derivative of GELU."""
    return _normal_cdf(x) + x * (_INV_SQRT_2PI * tl.exp(-0.5 * x * x))


@triton.jit
def _normal_cdf(x):
    return 0.5 + 0.5 * tl.erf(x * _SQRT_HALF)
