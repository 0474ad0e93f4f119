"""Triton kernels, the portable fast path on a CUDA GPU: an op's module has its kernels, `forward` and `backward`."""
