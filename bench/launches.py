"""Which Triton kernels the ops launch, and how each is specialised: found by launching them on tensors without memory.

The ops' own launchers run, on meta tensors and under a driver that names an architecture and launches nothing, so that
the list follows from the code that chooses block sizes, and needs no GPU.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.suites.kernel_cases import BACKWARD, FORWARD, OpCase, as_list, meta_inputs, meta_outputs
from mra_kernels.ops import OPS
from mra_kernels.triton import _gemm

# What the launchers ask of a GPU: multiprocessors, TMA, shared memory beyond 163 KB.
DEVICES = {
    80: _gemm.Device(108, False, False),
    90: _gemm.Device(132, True, True),
    100: _gemm.Device(148, True, True),
}


@dataclass
class Launch:
    """One kernel in one specialisation.

    Attributes:
        kernel: its name.
        arch: compute capability without its dot.
        constants: compile-time arguments by name, but for those that are None.
        users: the ops, directions and dtypes that launch it.
        source, options: what Triton's compiler takes.
    """

    kernel: str
    arch: int
    constants: dict[str, Any]
    source: ASTSource
    options: dict[str, Any]
    users: set[tuple[str, str, torch.dtype]] = field(default_factory=set)

    @property
    def configuration(self) -> str:
        """Compile-time arguments and warps, for readers."""
        chosen = [f"{name} {value}" for name, value in self.constants.items()]
        return ", ".join([*chosen, f"{self.options['num_warps']} warps"])


class _Driver:
    """Says what is asked of a driver before a launch; the device's number is its architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def launches(
    cases: Sequence[OpCase], dtypes: Sequence[torch.dtype], arch: int, batches: Sequence[int] = (1, 8)
) -> list[Launch]:
    """Every kernel that the ops of `cases` launch, forward and backward, once in each specialisation.

    An op that has a reason in place of a Triton backend launches none.
    """
    found: dict[tuple[Any, Any], Launch] = {}
    for case in cases:
        if isinstance(OPS[case.op].backends["triton"], str):
            continue
        for dtype in dtypes:
            for batch in batches:
                for direction in (FORWARD, BACKWARD):
                    with _recording(arch, found, (case.op, direction, dtype)):
                        _call(case, batch, dtype, direction)
    return list(found.values())


@contextmanager
def _recording(arch: int, found: dict[tuple[Any, Any], Launch], user: tuple[str, str, torch.dtype]) -> Iterator[None]:
    def record(
        kernel: JITFunction,
        key: Any,
        signature: Any,
        device: int,
        constants: Any,
        options: Any,
        attrs: Any,
        warmup: bool,
    ) -> None:
        """In place of `JITFunction._do_compile`: returns nothing, so that nothing is launched either."""
        if (kernel, key) not in found:
            named = {kernel.arg_names[path[0]]: value for path, value in constants.items() if len(path) == 1}
            chosen = {name: value for name, value in named.items() if name.isupper() and value is not None}
            source = ASTSource(kernel, signature, constants, attrs)
            found[kernel, key] = Launch(kernel.fn.__name__, arch, chosen, source, dict(options.__dict__))
        found[kernel, key].users.add(user)

    before = driver.active if driver._active is not None else None
    driver.set_active(_Driver(arch))
    try:
        with patch.object(JITFunction, "_do_compile", record), patch.object(_gemm, "WITHOUT_GPU", DEVICES[arch]):
            yield
    finally:
        driver._active = before


def _call(case: OpCase, batch: int, dtype: torch.dtype, direction: str) -> None:
    """One direction of an op, as its Triton backend is called."""
    module = import_module(f"mra_kernels.triton.{case.op}")
    schema = getattr(torch.ops.mra, case.op).default._schema
    inputs = meta_inputs(case, batch, dtype)
    keeps = any(argument.name == "keep" for argument in schema.arguments)
    if direction == FORWARD:
        for keep in ((False,), (True,)) if keeps else ((),):
            module.forward(*inputs.values(), *keep)
        return
    outputs = as_list(module.forward(*inputs.values(), *([True] if keeps else [])))
    known = inputs | {value.name: output for value, output in zip(schema.returns, outputs, strict=True)}
    public = schema.returns[: len(meta_outputs(case, batch, dtype))]
    known |= {f"grad_{value.name}": torch.empty_like(known[value.name]) for value in public}
    backward = getattr(torch.ops.mra, f"{case.op}_backward").default._schema
    arguments: list[Tensor | float | None] = [known.get(argument.name) for argument in backward.arguments[:-2]]
    module.backward(*arguments, [True] * len(backward.returns))
