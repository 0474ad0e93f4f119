"""`python -m bench aot`: every kernel as a GPU's compiler makes it, without a GPU.

Triton's kernels are compiled in each specialisation that `launches` finds; those in CUDA C++ are read from the built
extension. A kernel with a stack that is not in `ALLOWED_STACK` fails the command.
"""

import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench import cubin
from bench.shapes import LARGE, XXLARGE
from bench.suites.kernel_cases import DIRECTIONS, cases, least_work
from mra_kernels.ops import OPS
from mra_kernels.triton._support import PROBLEM

if TYPE_CHECKING:
    from bench.launches import Launch

ARCHS = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOWERS = (LARGE, XXLARGE)

# An H200 by its data sheet: bytes and, on tensor cores, operations a second.
BANDWIDTH, TENSOR_CORES = 4.8e12, 989e12

# Kernels, by language, name and architecture, that may keep something in local memory, and why. None on sm_90.
ALLOWED_STACK: dict[tuple[str, str, int], str] = {
    ("Triton", "_patch_conv_norm", 100): "16-bit, 512 columns: the accumulator is half of the registers",
}


@dataclass(frozen=True)
class Row:
    """One kernel as it was compiled.

    Attributes:
        language: Triton or CUDA C++.
        users: the ops that launch it, and in which direction; empty where the kernel's name says it.
        kernel, configuration: its name, and its compile-time arguments.
        arch: compute capability without its dot.
        warps: of a block; 0 where the launch decides.
        shared: bytes of a block, but for those that a launch of a CUDA C++ kernel adds.
        figures: see `cubin.Figures`.
    """

    language: str
    users: str
    kernel: str
    configuration: str
    arch: int
    warps: int
    shared: int
    figures: cubin.Figures

    @property
    def excuse(self) -> str | None:
        """Why its stack is no error; None where it has none, or where it is one."""
        return ALLOWED_STACK.get((self.language, self.kernel, self.arch)) if self.spills else None

    @property
    def spills(self) -> bool:
        """Whether anything is kept in local memory."""
        return bool(self.figures.stack or self.figures.spills)

    @property
    def useful(self) -> float | None:
        """Of the multiply-adds in the loop, the share that the sums of a depthwise convolution need; None elsewhere."""
        numbers = [int(number) for number in re.findall(r"\b\d+\b", self.configuration)]
        taps = _LOOP_TAPS.get(self.kernel)
        return taps(self, numbers) / self.figures.loop.multiply_adds if taps else _MMA_USEFUL.get(self.kernel)

    @property
    def warps_per_multiprocessor(self) -> int | None:
        """Warps that registers, shared memory and the number of blocks let run at once."""
        if not self.warps:
            return None
        registers = 65536 // (self.warps * -(-max(1, self.figures.registers) * 32 // 256) * 256)
        limit = {80: 164, 90: 228, 100: 228}[self.arch] * 1024
        blocks = min(registers, limit // (self.shared + 1024), 64 // self.warps, 32)
        return blocks * self.warps


# What a thread's loop adds to the sums of a depthwise 7x7 convolution, from the tile that the configuration names.
_LOOP_TAPS: dict[str, Callable[[Row, list[int]], int]] = {
    # Triton: rows, columns and channels; seven taps at a time for a map, all 49 for their gradient.
    "_convolve": lambda row, tile: 7 * prod(tile[:3]) // (32 * row.warps),
    "_parameter_gradients": lambda row, tile: 49 * prod(tile[:3]) // (32 * row.warps),
    # CUDA C++: one row of 8 pixels, and seven rows of some pixels of two channels, whose bias is a sum, too.
    "depthwise_conv7_kernel": lambda row, tile: 49 * 8,
    "depthwise_conv_gelu_kernel": lambda row, tile: 49 * 8,
    "depthwise_weight_gradient_kernel": lambda row, tile: 7 * tile[1] * 50 * 2,
}
_MMA_USEFUL = {
    # 16 tiles of 8 columns, each for 49 taps, of 7 products of 16 x 8 x 16; their gradient has the bias's, too.
    "depthwise_conv7_mma_kernel": 16 * 8 * 49 / (7 * 2048),
    "depthwise_weight_gradient_mma_kernel": 16 * 8 * 50 / (7 * 2048),
}


class Spill(RuntimeError):
    """A kernel keeps something in local memory."""


def triton_rows(archs: Sequence[int], only: Sequence[str], sample: bool, say: Callable[[str], None]) -> list[Row]:
    """Compiles the Triton kernels of the ops that `only` names; `sample` takes bfloat16 and the first shape of each."""
    if PROBLEM is not None:
        say(f"SKIPPED: the Triton kernels. {PROBLEM}")
        return []
    from bench.launches import launches

    wanted = [case for op in OPS if _matches(op, only) for case in cases(op, TOWERS)[: 1 if sample else None]]
    dtypes = DTYPES[:1] if sample else DTYPES
    found = [launch for arch in archs for launch in launches(wanted, dtypes, arch, (1,) if sample else (1, 8))]
    say(f"{len(found)} specialisations of {len({launch.kernel for launch in found})} Triton kernels")
    # Forked, because a jitted function cannot be pickled: the children inherit the list, and take numbers.
    _LAUNCHES[:] = found
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_compile, range(len(found)), chunksize=4))


_LAUNCHES: "list[Launch]" = []


def _compile(number: int) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget

    launch = _LAUNCHES[number]
    binary = triton.compile(launch.source, target=GPUTarget("cuda", launch.arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        (figures,) = cubin.figures(Path(file.name)).values()
    users = ", ".join(sorted({f"{op} {direction}" for op, direction, _ in launch.users}))
    dtypes = sorted({str(dtype).removeprefix("torch.") for *_, dtype in launch.users})
    configuration = f"{launch.configuration}; {', '.join(dtypes)}"
    warps, shared = launch.options["num_warps"], binary.metadata.shared
    return Row("Triton", users, launch.kernel, configuration, launch.arch, warps, shared, figures)


def cuda_rows(archs: Sequence[int], only: Sequence[str], say: Callable[[str], None]) -> list[Row]:
    """Reads the CUDA C++ kernels of the built extension."""
    import mra_kernels

    info = mra_kernels.build_info()
    if not info["cuda"]:
        say("SKIPPED: the CUDA C++ kernels. This build has none: install with MRA_CUDA=on")
        return []
    from mra_kernels import _C  # type: ignore[attr-defined]

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [cubin.find("cuobjdump"), "-xelf", "all", _C.__file__], cwd=folder, check=True, capture_output=True
        )
        for file in sorted(Path(folder).glob("*.cubin")):
            match = re.search(r"sm_(\d+)", file.name)
            if match is None or int(match[1]) not in archs:
                continue
            found = cubin.figures(file)
            for name, readable in zip(found, _demangle(found), strict=True):
                kernel, arguments = _split(readable)
                if _matches(kernel, only):
                    figures = found[name]
                    warps = figures.threads // 32
                    rows.append(Row("CUDA C++", "", kernel, arguments, int(match[1]), warps, figures.shared, figures))
    return rows


def _demangle(names: Iterable[str]) -> list[str]:
    return subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()


def _split(readable: str) -> tuple[str, str]:
    """`void mra::convolve<float, 3>(float const*, ...)` -> `convolve`, `float, 3`."""
    name = re.sub(r"\(anonymous namespace\)::", "", readable)
    match = re.match(r"(?:void )?(?:\w+::)*(\w+)(?:<(.*)>)?\(", name)
    return (match[1], (match[2] or "").strip()) if match else (readable, "")


def _matches(name: str, only: Sequence[str]) -> bool:
    return not only or any(fnmatch(name, pattern) for pattern in only)


def work() -> list[tuple[str, str, int, int | None, float]]:
    """Case, direction, least bytes, operations, and floor in seconds on an H200: one picture, bfloat16."""
    found = []
    for op in OPS:
        for case in cases(op, TOWERS):
            for direction in DIRECTIONS:
                moved, flops = least_work(case, 1, torch.bfloat16, direction)
                found.append((case.name, direction, moved, flops, max(moved / BANDWIDTH, (flops or 0) / TENSOR_CORES)))
    return found
