"""A Triton kernel that a block size makes spill, for `test_bench_aot.py`."""

import triton
import triton.language as tl


@triton.jit
def spilling(x, y, count, BLOCK: tl.constexpr):  # noqa: N803
    """x, y: [BLOCK] -> y = y * x + y, `count` times."""
    at = tl.arange(0, BLOCK)
    a = tl.load(x + at)
    b = tl.load(y + at)
    for _ in range(count):
        b = tl.fma(b, a, b)
    tl.store(y + at, b)
