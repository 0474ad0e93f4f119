"""`python -m cuda_simulator.samples LIBRARY KERNEL...` runs kernels in every order, for a build with a sanitizer."""

import sys
from pathlib import Path

from cuda_simulator import ORDERS
from cuda_simulator.samples import run

library, *kernels = sys.argv[1:]
for kernel in kernels:
    for order in ORDERS:
        run(Path(library), kernel, order)
