"""Benchmarks: `python -m bench` from the repository root. See bench/README.md."""

import os

# PyTorch's profiler writes two lines for every profile; it reads this when torch is imported, in each process.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
