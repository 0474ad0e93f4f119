"""The slowest kernels, eager beside fused."""

from typing import Any

from bench.report.blocks import Block, Cell, Section, Table, Text, names, numbers, rows
from bench.report.data import Machine
from bench.report.numbers import duration

_MOST = 12


def section(machine: Machine, key: str) -> Section:
    """The section of a machine's profiles."""
    groups = machine.groups("profile")
    if not groups:
        return Section(key, "Profiles", [Text("Not measured. `python -m bench profile` measures them.", "missing")])
    blocks: list[Block] = [
        Text("Kernels, or on a CPU operators without those they call, by the profiler, which itself costs time.")
    ]
    for group in groups:
        columns, sides = [], []
        for variant, result in group.results.items():
            if result["failure"]:
                blocks.append(Text(f"{group.name}, {variant}: {result['failure']}", "missing"))
                continue
            columns += [*names(f"{variant}: kernel"), *numbers("calls", "time")]
            sides.append(_side(result["kernels"]))
        if any(sides):
            height = max(len(side) for side in sides)
            blank = [Cell(""), Cell(""), Cell("")]
            lines = [[cell for side in sides for cell in (side[i] if i < len(side) else blank)] for i in range(height)]
            traces = list(
                dict.fromkeys(str(r["facts"]["trace"]) for r in group.results.values() if r["facts"].get("trace"))
            )
            note = f"Trace, for ui.perfetto.dev: {', '.join(traces)}, beside results.json." if traces else ""
            blocks.append(Table(columns, rows(*lines), group.name, note))
    return Section(key, "Profiles", blocks)


def _side(kernels: list[dict[str, Any]]) -> list[list[Cell]]:
    return [
        [Cell(str(k["name"]), look="code", hint=str(k["name"])), Cell(str(k["calls"])), Cell(duration(k["us"]))]
        for k in kernels[:_MOST]
    ]
