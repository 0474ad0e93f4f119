"""The CUDA C++ kernels on the CPU simulator: built and bound like the extension, called through `mra_kernels.native`.

`simulated()` makes every native op run its CUDA kernels on tensors of the CPU: the same Python, the same bindings and
the same host code choose and launch them as on a GPU.
"""

import importlib.util
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pybind11
import torch
from cuda_simulator import ORDERS, Order, Program, Simulator, build
from torch import Tensor

from mra_kernels.dispatch import Backend
from mra_kernels.native import _extension
from mra_kernels.ops import OPS

ROOT = Path(__file__).parent.parent
HERE = ROOT / "tests/simulated"
FOLDER = ROOT / "build/cuda_simulator"
GPU = torch.device("cuda", 0)

Edits = Mapping[str, Sequence[tuple[str, str]]]


def program(edits: Edits | None = None) -> Program:
    """The extension's CUDA kernels and bindings; inline PTX is replaced by its meaning, in `tests/simulated/common`."""
    return Program(
        name="mra",
        root=ROOT / "csrc",
        kernels=sorted(f"cuda/{path.name}" for path in (ROOT / "csrc/cuda").glob("*.cu")),
        host=[ROOT / "csrc/bindings.cpp", HERE / "no_cpu_kernels.cpp"],
        host_flags=[f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"],
        include=[HERE],
        defines=['MRA_VERSION="0"', 'MRA_COMPILER="g++"', 'MRA_CUDA="simulated"', 'MRA_CUDA_ARCHS="none"'],
        edits=edits or {},
    )


class Extension:
    """The simulated `mra_kernels._C`, and the engine that runs its kernels."""

    def __init__(self, library: Path) -> None:
        # pybind11 makes one module of a name; the last part is what the library calls itself.
        name = f"{library.stem}._C"
        loader = ExtensionFileLoader(name, str(library))
        spec = importlib.util.spec_from_loader(name, loader)
        assert spec is not None
        self.module = importlib.util.module_from_spec(spec)
        loader.exec_module(self.module)
        self.simulator = Simulator(library)


@cache
def extension(kind: str = "plain") -> Extension:
    """Built when it is first asked for."""
    return Extension(build(program(), kind, FOLDER))


@contextmanager
def simulated(on: Extension | None = None, order: Order = ORDERS[0], **settings: int) -> Iterator[None]:
    """Inside the block, backend `native` on a CPU's tensors is the simulated GPU's; settings: see `Simulator.order`."""
    on = extension() if on is None else on

    def place(tensor: Tensor) -> tuple[int, int, int, int]:
        return _extension.DTYPE_CODES[tensor.dtype], 0, 0, 0

    with ExitStack() as stack:
        stack.enter_context(on.simulator.order(order, **settings))
        stack.enter_context(patch.multiple(_extension, HAS_CUDA=True, PROBLEM=None))
        for name, module in list(sys.modules.items()):
            if name.startswith("mra_kernels.native."):
                for attribute, value in (("extension", on.module), ("place", place)):
                    if hasattr(module, attribute):
                        stack.enter_context(patch.object(module, attribute, value))
        for op in OPS.values():
            if isinstance(backend := op.backends["native"], Backend):
                stack.enter_context(patch.dict(op.backends, native=_on_gpu(backend)))
        yield


def _on_gpu(backend: Backend) -> Backend:
    def supports(device: torch.device, dtype: torch.dtype) -> str | None:
        return backend.supports(GPU, dtype)

    return replace(backend, supports=supports)


def served_ops() -> list[str]:
    """The ops that have CUDA C++ kernels, as their predicates say."""
    with patch.multiple(_extension, HAS_CUDA=True, PROBLEM=None):
        backends: dict[str, Any] = {name: op.backends["native"] for name, op in OPS.items()}
        return [n for n, b in backends.items() if isinstance(b, Backend) and b.supports(GPU, torch.float32) is None]
