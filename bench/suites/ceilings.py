"""The two ceilings that every kernel is held against: moving bytes, and multiplying matrices."""

import torch

from bench.compare import Case, measure
from bench.step import Result, Run
from bench.timing import Call, launch_floor
from mra_model.environment import dtype_name

# Far beyond any cache: bytes of the source.
COPY_BYTES = {"cuda": 4 << 30, "cpu": 1 << 30}

# Of a square product, large enough for the full rate.
SIZES = {"cuda": 8192, "cpu": 4096}
DTYPES = {
    "cuda": (torch.bfloat16, torch.float32, torch.float16),
    "cpu": (torch.bfloat16, torch.float32),
}

# Rows of a product that are compared: the whole in float64 would take longer than all else.
CHECKED_ROWS = 256


def run(run: Run) -> None:
    """A copy within the device's memory, a square product, and on a GPU the cost of a launch; on random data."""
    _copy(run)
    for dtype in DTYPES[run.device.type]:
        _product(run, run.pick(SIZES[run.device.type], 32), dtype)
    if run.device.type == "cuda":
        floor = launch_floor(run.device)
        for variant, times in floor.items():
            run.record(Result("launch", variant, {"suite": "ceilings", "what": "launch"}, times))


def _copy(run: Run) -> None:
    count = run.pick(COPY_BYTES[run.device.type], 1 << 10) // 2
    source = torch.randn(count // 64, device=run.device).bfloat16().repeat(64)
    target = torch.empty_like(source)
    case = Case(
        name=f"copy {source.nbytes / 2**20:g} MiB",
        labels={"suite": "ceilings", "what": "copy"},
        # The whole in float64 would be four times as large: its end is compared.
        variants={"device to device": lambda: target.copy_(source)[-65536:]},
        outputs=("end of target",),
        exact=lambda: source[-65536:].double(),
        bytes=2 * source.nbytes,
    )
    measure(run, case)


def _product(run: Run, size: int, dtype: torch.dtype) -> None:
    left, right = (torch.randn(size, size, device=run.device, dtype=dtype) for _ in range(2))
    variants: dict[str, Call] = {"torch.mm": lambda: left @ right}
    if run.device.type == "cpu" and torch.backends.mkldnn.is_available():
        # Not what torch.mm takes in float32, and twice as fast on some processors.
        weight = right.mT.contiguous()
        variants["library: oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(left, weight, None, "none", [], "")
    case = Case(
        name=f"matrix product {size}^3 {dtype_name(dtype)}",
        labels={"suite": "ceilings", "what": "product", "dtype": dtype_name(dtype)},
        variants=variants,
        outputs=("first rows",),
        exact=lambda: left[:CHECKED_ROWS].double() @ right.double(),
        checked=lambda outputs: [outputs[0][:CHECKED_ROWS]],
        bytes=3 * left.nbytes,
        flops=2 * size**3,
        dtype=dtype,
    )
    measure(run, case)
