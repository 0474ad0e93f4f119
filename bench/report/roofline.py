"""Kernels under the machine's two ceilings."""

from bench.report import charts
from bench.report.blocks import Block, Chart, Section, Text
from bench.report.cases import KernelCase, ceilings, kernel_cases
from bench.report.data import EAGER, Machine
from bench.report.numbers import NOT_MEASURED, count, rate

_COLD = ("cold", "warm", "call")


def section(machine: Machine, key: str) -> Section:
    """The section of a machine's rooflines, one for each dtype."""
    of = ceilings(machine)
    cases = kernel_cases(machine)
    blocks: list[Block] = []
    for dtype in dict.fromkeys(case.label("dtype") for case in cases):
        found = [case for case in cases if case.label("dtype") == dtype]
        points = [point for case in found if (point := _point(case)) is not None]
        if not points:
            continue
        product = of.product.get(dtype)
        ceiling = f"copy {rate(of.copy, 'B/s') if of.copy else NOT_MEASURED}"
        ceiling += f", product {rate(product, 'FLOP/s') if product else NOT_MEASURED}"
        left_out = len(found) - len(points)
        note = f"Ceilings on this machine: {ceiling}. Times out of the cache where they were measured. "
        note += "Bytes and operations are the least that the case needs, so a point can only be too low. "
        note += f"{count(left_out, 'case')} without products or without times left out." if left_out else ""
        svg = charts.roofline(points, of.copy, product, f"roofline of {machine.name}, {dtype}")
        blocks.append(Chart(svg, dtype, note))
    if not blocks:
        blocks.append(Text("Not measured: there are no kernel times with known operations.", "missing"))
    return Section(key, "Roofline", blocks)


def _point(case: KernelCase) -> charts.Point | None:
    """None where neither side has a time, or the case counts no operations."""
    condition = next((name for name in _COLD if name in case.subject.conditions()), None)
    result = case.subject.result(EAGER)
    if condition is None or result is None or not result["flops"] or not result["bytes"]:
        return None
    ours = case.ours(condition)
    eager, own = case.rate(EAGER, condition, "flops"), case.rate(ours, condition, "flops")
    if eager is None and own is None:
        return None
    gain = case.subject.gain(ours, EAGER, condition) if ours else None
    return charts.Point(
        kind=case.label("op"),
        intensity=result["flops"] / result["bytes"],
        eager=eager,
        ours=own,
        is_loss=gain is not None and gain.value < 1,
        hint=case.subject.name,
    )
