"""The vision tower: its time by part, launches and memory, forward and training."""

from bench.report import charts
from bench.report.blocks import Block, Cell, Chart, Column, Section, Table, Text, names, numbers
from bench.report.cells import gained, optional, timed
from bench.report.data import Machine, Subject
from bench.report.numbers import error, size

# Of a variant's launches, in the table.
MOST_OPERATORS = 4


def section(machine: Machine, key: str) -> Section:
    """The section of a machine's vision tower."""
    subjects = machine.subjects("vision")
    blocks: list[Block] = []
    for direction, title in (("forward", "Forward"), ("training", "Training step")):
        found = [subject for subject in subjects if subject.labels.get("direction") == direction]
        if not found:
            blocks.append(Text(f"{title}: not measured. `python -m bench vision` measures it.", "missing"))
            continue
        bars = [bar for subject in found for bar in _bars(subject)]
        if bars:
            label = f"vision tower on {machine.name}, {direction}, time by part"
            note = "Parts were timed apart, by hooks; behind each bar the whole, timed without them."
            blocks.append(Chart(charts.stacks(bars, label), f"{title}: time by part", note))
        blocks.append(_table(found, title))
    traced = [subject for subject in subjects if subject.labels.get("direction") == "launches"]
    return Section(key, "Vision tower", [*blocks, *map(_launches, traced)])


def describe(subject: Subject) -> str:
    """`B=1, 1024, bfloat16`, and with checkpointing that."""
    of = subject.labels
    found = [f"{mark}{of[name]}" for mark, name in (("B=", "batch"), ("", "side"), ("", "dtype")) if name in of]
    return ", ".join(found + (["checkpointing"] if of.get("checkpointing") else [])) or subject.name


def _launches(subject: Subject) -> Table:
    """Launches by variant, with the most frequent operators."""
    lines, counted = [], ""
    for variant in subject.variants():
        result = subject.result(variant)
        assert result is not None, f"{variant} is one of the subject's variants"
        counted = str(result["facts"].get("counted", ""))
        operators = list(result["facts"].get("operators", {}).items())[:MOST_OPERATORS]
        most = ", ".join(f"{count} {name}" for name, count in operators)
        count = Cell("none", result["failure"], "bad") if result["failure"] else Cell(str(result["launches"]))
        lines.append([Cell(variant), count, Cell(most, look="quiet"), Cell(error(result["errors"]))])
    columns = [*names("variant"), *numbers("launches"), *names("most frequent"), *numbers("error")]
    return Table(columns, [lines], f"Launches, {describe(subject)}", f"Counted {counted}; not measured on a GPU.")


def _bars(subject: Subject) -> list[charts.Stack]:
    found = []
    for variant in subject.variants():
        result = subject.result(variant)
        if result is None or not result["parts"] or result["failure"]:
            continue
        time = subject.time(variant, _condition(subject))
        found.append(
            charts.Stack(f"{describe(subject)}  {variant}", result["parts"], None if time is None else time.median)
        )
    return found


def _condition(subject: Subject) -> str:
    return "call" if "call" in subject.conditions() else next(iter(subject.conditions()), "call")


def _table(subjects: list[Subject], title: str) -> Table:
    columns = [*names("what", "variant"), *numbers("time", "gain over eager", "launches", "peak memory")]
    columns.append(
        Column("error", hint="the worst output, relative, against the same in float64, or in the dtype below")
    )
    bodies = []
    for subject in subjects:
        lines = []
        variants = subject.variants()
        for index, variant in enumerate(variants):
            result, condition = subject.result(variant), _condition(subject)
            assert result is not None, f"{variant} is one of the subject's variants"
            time = subject.time(variant, condition)
            lines.append(
                [
                    *([Cell(describe(subject), look="name", rows=len(variants))] if index == 0 else []),
                    Cell(variant),
                    timed(time, result),
                    gained(subject, variant, condition),
                    optional(str(result["launches"]) if result["launches"] else None),
                    optional(None if result["memory"] is None else size(result["memory"])),
                    Cell(error(result["errors"]), str(result["facts"].get("exact", ""))),
                ]
            )
        bodies.append(lines)
    return Table(columns, bodies, title, "Gain: only against the eager that took turns with the variant.")
