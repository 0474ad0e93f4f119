"""GELU with the exact error function, and its derivative, in float32 registers."""

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def gelu(x):
    """x: float32 -> x Phi(x)."""
    return x * _normal_cdf(x)


@triton.jit
def gelu_derivative(x):
    """x: float32 -> Phi(x) + x phi(x), the derivative of GELU."""
    return _normal_cdf(x) + x * (_INV_SQRT_2PI * tl.exp(-0.5 * x * x))


@triton.jit
def _normal_cdf(x):
    return 0.5 + 0.5 * tl.erf(x * _SQRT_HALF)
