"""What the tower's matrix products and attention alone cost in the library: the floor that no fusion removes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.compare import Case, measure
from bench.shapes import LARGE, TINY, Gemm, Tower, fused_gemms, gemms
from bench.step import Result, Run


def run(run: Run, *, batch: int) -> None:
    """Each product of the tower without bias or epilogue, their sum over a forward, and attention."""
    tower = run.pick(LARGE, TINY)
    sums: dict[str, float] = {}
    flops = 0
    for gemm in gemms(tower, batch):
        for condition, time in _product(run, gemm, batch).items():
            sums[condition] = sums.get(condition, 0.0) + gemm.calls * time
        flops += gemm.calls * gemm.flops
    facts = {f"{condition} ms": round(total / 1e3, 4) for condition, total in sums.items()}
    labels = _labels(batch, "all products of a forward")
    run.record(Result(f"all products of a forward B={batch}", "library, summed", labels, flops=flops, facts=facts))
    for gemm in fused_gemms(tower, batch):
        _product(run, gemm, batch)
    _attention(run, tower, batch)


def _labels(batch: int, what: str) -> dict[str, str | int | bool]:
    return {"suite": "gemms", "what": what, "batch": batch, "dtype": "bfloat16"}


def _product(run: Run, gemm: Gemm, batch: int) -> dict[str, float]:
    """Records one product; its medians in microseconds by condition."""
    x = torch.randn(gemm.rows, gemm.inputs, device=run.device, dtype=torch.bfloat16)
    weight = torch.randn(gemm.outputs, gemm.inputs, device=run.device, dtype=torch.bfloat16) / gemm.inputs**0.5
    case = Case(
        name=f"{gemm.name} {gemm.rows}x{gemm.inputs}x{gemm.outputs}, {gemm.calls} a forward",
        labels=_labels(batch, gemm.name),
        variants={"library": lambda: F.linear(x, weight)},
        outputs=("y",),
        exact=lambda: F.linear(x.double(), weight.double()),
        bytes=2 * (gemm.rows * (gemm.inputs + gemm.outputs) + gemm.inputs * gemm.outputs),
        flops=gemm.flops,
    )
    return {condition: times.median for condition, times in measure(run, case)["library"].times.items()}


def _attention(run: Run, tower: Tower, batch: int) -> None:
    tokens, head = tower.grid**2, tower.width // tower.heads
    query, key, value = (
        # Stock CLIP hands over views of [B, L, heads * d].
        torch.randn(batch, tokens, tower.heads, head, device=run.device, dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    )
    attend: Callable = F.scaled_dot_product_attention
    case = Case(
        name=f"ViT attention {tokens} tokens B={batch}, {tower.layers} a forward",
        labels=_labels(batch, "ViT attention"),
        variants={"scaled_dot_product_attention": lambda: attend(query, key, value)},
        outputs=("y",),
        exact=lambda: attend(query.double(), key.double(), value.double()),
        bytes=4 * query.nbytes,
        flops=4 * batch * tokens * tokens * tower.width,
    )
    measure(run, case)
