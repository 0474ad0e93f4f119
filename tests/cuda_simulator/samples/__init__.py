"""The sample kernels: how they are called, and what they must give."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cuda_simulator import ORDERS, Order, Program, Simulator


@dataclass(frozen=True)
class Sample:
    """A kernel's input, [rows, columns], the shape of its output, and the output in NumPy."""

    rows: int
    columns: int
    shape: Sequence[int]
    expected: Callable[[np.ndarray], np.ndarray]


SAMPLES = {
    "row_sums": Sample(5, 150, (5,), lambda x: x.sum(1)),
    "reverse": Sample(3, 128, (3, 128), lambda x: x[:, ::-1]),
    "tile_sums": Sample(5, 64, (64,), lambda x: np.roll(x.sum(0), -1)),
    "increment": Sample(3, 70, (3, 70), lambda x: x + 1),
    "atomic_sum": Sample(4, 32, (1,), lambda x: x.sum().reshape(1)),
    "prefix_sums": Sample(1, 64, (64,), lambda x: x.reshape(2, 32).cumsum(1).reshape(64)),
    "gram": Sample(16, 16, (16, 8), lambda x: x @ x[:8].T),
    "symmetric_sums": Sample(32, 8, (32, 8), lambda x: x + 2 * x.reshape(4, 8, 8).swapaxes(1, 2).reshape(32, 8)),
}


def program(*edits: tuple[str, str]) -> Program:
    """The samples' library, with these replacements in its source."""
    return Program("samples", Path(__file__).parent, ["samples.cu", "float16.cu"], edits={"samples.cu": edits})


def run(library: Path, kernel: str, order: Order = ORDERS[0]) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel gives for whole numbers, and what it must give; both exact.

    Raises:
        SimulationError: the kernel broke a rule.
        RuntimeError: the launch was refused.
    """
    sample = SAMPLES[kernel]
    x = np.random.default_rng(0).integers(-99, 99, (sample.rows, sample.columns)).astype(np.float32)
    y = np.zeros(sample.shape, np.float32)
    simulator = Simulator(library)
    function = getattr(simulator.library, f"run_{kernel}")
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, y)]
    with simulator.order(order):
        status = function(*pointers, sample.rows, sample.columns)
    if status != 0:
        raise RuntimeError(f"{kernel}: launch failed with CUDA error {status}")
    return y, sample.expected(x)
