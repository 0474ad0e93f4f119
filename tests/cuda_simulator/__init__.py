"""Runs CUDA C++ kernels on a CPU, one fiber a thread, to find out whether they are right. See README.md."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cuda_simulator.build import BUILDS, BuildError, Program, build, run_python
from cuda_simulator.translate import TranslationError, translate

__all__ = [
    "ALL_BLOCKS",
    "BUILDS",
    "ORDERS",
    "BuildError",
    "Order",
    "Program",
    "SimulationError",
    "Simulator",
    "Statistics",
    "TranslationError",
    "build",
    "run_python",
    "translate",
]


@dataclass(frozen=True)
class Order:
    """In which order threads and blocks run, and when asynchronous copies land.

    Args:
        name: `forward` takes the lowest first, and copies land when they are waited for; `reverse` takes the highest
            first, and copies land at once; `random` takes any.
        seed: of `random`.
    """

    name: str = "forward"
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.name}{self.seed}" if self.name == "random" else self.name


ORDERS = (Order("forward"), Order("reverse"), *(Order("random", seed) for seed in range(1, 7)))
ALL_BLOCKS = 2**64 - 1
# Few, so that loops over a grid have something to do on small maps.
MULTIPROCESSORS = 4


class Statistics(ctypes.Structure):
    """How many of each have run: barriers are of a block, collectives of a warp, copies asynchronous."""

    _fields_: Sequence = [
        (name, ctypes.c_uint64) for name in ("launches", "blocks", "barriers", "collectives", "copies", "atomics")
    ]


class SimulationError(RuntimeError):
    """A kernel broke a rule of the programming model; the message says which, and where."""


class Simulator:
    """Controls the engine in a library made by `build`."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.cuda_simulator_configure.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int]
        self.library.cuda_simulator_failure.restype = ctypes.c_char_p

    @contextmanager
    def order(
        self, order: Order = ORDERS[0], last_blocks: int = ALL_BLOCKS, multiprocessors: int = MULTIPROCESSORS
    ) -> Iterator[None]:
        """Launches inside the block run in this order; of each grid the last blocks alone, counted with x innermost.

        The device says that it has `multiprocessors`, by which host code may cut its work.

        Raises:
            SimulationError: at the block's end, a launch that failed, if no other exception told of it.
        """
        names = ("forward", "reverse", "random")
        self.library.cuda_simulator_configure(names.index(order.name), order.seed, last_blocks, multiprocessors)
        try:
            yield
        finally:
            self.library.cuda_simulator_configure(0, 0, ALL_BLOCKS, MULTIPROCESSORS)
            failure = self.library.cuda_simulator_failure().decode()
        if failure:
            raise SimulationError(failure)

    def statistics(self) -> Statistics:
        """The counts since the library was loaded."""
        statistics = Statistics()
        self.library.cuda_simulator_statistics(ctypes.byref(statistics))
        return statistics
