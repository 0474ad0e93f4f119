"""The two ceilings that every kernel is held against: moving bytes, and multiplying matrices."""

import torch

from bench.compare import Case, measure
from bench.step import Result, Run
from bench.timing import launch_floor


def run(run: Run) -> None:
    """A device-to-device copy of 4 GiB, an 8192^3 product in bfloat16, and the cost of a launch; on random data."""
    _copy(run)
    _product(run)
    if run.device.type == "cuda":
        floor = launch_floor(run.device)
        for variant, times in floor.items():
            run.record(Result("launch", variant, times))


def _copy(run: Run) -> None:
    count = run.pick(2 << 30, 1 << 10)
    source = torch.randn(count // 64, device=run.device).bfloat16().repeat(64)
    target = torch.empty_like(source)
    case = Case(
        name=f"copy {source.nbytes / 2**20:g} MiB",
        # The whole in float64 would be 16 GiB: its end is compared.
        variants={"device to device": lambda: target.copy_(source)[-65536:]},
        outputs=("end of target",),
        exact=lambda: source[-65536:].double(),
        bytes=2 * source.nbytes,
    )
    measure(run, case)


def _product(run: Run) -> None:
    size = run.pick(8192, 32)
    left, right = (torch.randn(size, size, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    case = Case(
        name=f"matrix product {size}^3 bfloat16",
        variants={"torch.mm": lambda: left @ right},
        outputs=("product",),
        exact=lambda: left.double() @ right.double(),
        bytes=3 * left.nbytes,
        flops=2 * size**3,
    )
    measure(run, case)
