"""Every step, most important first: what is cut off when the minutes run out is at the end."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from bench.step import Run, Step


def call(room: str, function: str, arguments: dict[str, Any], run: Run) -> None:
    """Imports a room of `bench` and runs one of its functions.

    Only here, in the worker: the rooms import the package that the first step builds, and a room that cannot be
    imported must cost only its own steps.
    """
    getattr(import_module(f"bench.suites.{room}"), function)(run, **arguments)


def _in(room: str, function: str = "run", **arguments: Any) -> Callable[[Run], None]:
    return partial(call, room, function, arguments)


_DEPTHWISE = "library depthwise 7x7, forward and both gradients, cuDNN and native, four stage shapes"
_KERNELS = "every fused kernel that exists against eager, forward and with backward"
_GEMM = "the tower's matrix products and attention alone, summed over a forward"
_VISION = "the tower's forward, eager and fused, by call and as CUDA graphs"
_COMPILE = "the tower's forward, torch.compile beside eager"
_TRAINING = "a training step of the tower, eager and fused, no checkpointing"
_AUTOTUNE = "the tower's forward, torch.compile(mode='max-autotune') beside eager"

STEPS = (
    Step("build", "pip install -e . with CUDA, from this checkout, offline", 90, _in("checks", "build")),
    Step("ceilings", "device copy and bf16 8192^3 product, random data", 20, _in("ceilings")),
    Step("tests", "pytest -m gpu: ops, modules and golden checkpoints on the device", 150, _in("checks", "tests")),
    Step("depthwise-b1", f"{_DEPTHWISE}, B=1", 40, _in("library", batch=1)),
    Step("kernels-b1", f"{_KERNELS}, B=1", 30, _in("kernels", batch=1)),
    Step("gemm-b1", f"{_GEMM}, B=1", 30, _in("gemms", batch=1)),
    Step("vision-b1", f"{_VISION}, B=1", 40, _in("vision", "run_forward", batch=1)),
    Step("depthwise-b8", f"{_DEPTHWISE}, B=8", 80, _in("library", batch=8)),
    Step("vision-b8", f"{_VISION}, B=8", 40, _in("vision", "run_forward", batch=8)),
    Step("gemm-b8", f"{_GEMM}, B=8", 50, _in("gemms", batch=8)),
    Step("kernels-b8", f"{_KERNELS}, B=8", 30, _in("kernels", batch=8)),
    Step("compile-b1", f"{_COMPILE}, B=1", 120, _in("vision", "run_compiled", batch=1, mode=None)),
    Step("compile-b8", f"{_COMPILE}, B=8", 120, _in("vision", "run_compiled", batch=8, mode=None)),
    Step("training-b1", f"{_TRAINING}, B=1", 45, _in("vision", "run_training", batch=1)),
    Step("training-b8", f"{_TRAINING}, B=8", 45, _in("vision", "run_training", batch=8)),
    Step("max-autotune-b1", f"{_AUTOTUNE}, B=1", 300, _in("vision", "run_compiled", batch=1, mode="max-autotune")),
    Step("max-autotune-b8", f"{_AUTOTUNE}, B=8", 300, _in("vision", "run_compiled", batch=8, mode="max-autotune")),
)
