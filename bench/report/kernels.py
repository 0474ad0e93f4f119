"""The kernels' section: an overview, and for each op bars, the full table and the names of what was beaten."""

from collections.abc import Callable, Sequence
from typing import Any

from bench.report import charts
from bench.report.blocks import Block, Cell, Chart, Column, Fold, Section, Table, Text, names, numbers, rows
from bench.report.cases import Ceilings, KernelCase, ceilings, first, kernel_cases
from bench.report.data import EAGER, Machine, geometric_mean, is_compiled, is_library
from bench.report.numbers import (
    DASH,
    NOT_MEASURED,
    TIMES,
    count,
    error,
    factor,
    in_unit,
    share,
    size,
    times,
    unit,
)

_DIRECTIONS = ("forward", "backward")
_NAMES_KEPT = 4

_Kept = dict[str, Any] | None

_READING = (
    "A bar is the median of eager over ours for inputs in the cache, a circle the same out of the cache, a whisker "
    "the 20th and 80th percentile of both sides set against each other. Hatched: a kernel that the automatic choice "
    "leaves alone, so that users get eager."
)


def section(machine: Machine, key: str) -> Section:
    """The section of a machine's kernels."""
    cases = kernel_cases(machine)
    if not cases:
        return Section(key, "Kernels", [Text("Not measured. `python -m bench kernels` measures them.", "missing")])
    of = ceilings(machine)
    by_op: dict[str, list[KernelCase]] = {}
    for case in cases:
        by_op.setdefault(case.label("op") or case.subject.name, []).append(case)
    below = [_op(machine, f"{key}-{index}", op, found, of) for index, (op, found) in enumerate(by_op.items(), start=1)]
    return Section(key, "Kernels", [Text(_READING), _overview(by_op)], below)


def _overview(by_op: dict[str, list[KernelCase]]) -> Table:
    """One row for each op, direction and dtype: the automatic choice against eager."""
    lines = []
    for op, cases in by_op.items():
        for direction, dtype in dict.fromkeys((case.label("direction"), case.label("dtype")) for case in cases):
            of = [case for case in cases if (case.label("direction"), case.label("dtype")) == (direction, dtype)]
            found = [gain.value for case in of if (gain := case.gain(first(case))) is not None]
            lost = sum(_is_lost(case) for case in of)
            choices = ", ".join(dict.fromkeys(_choice(case) for case in of))
            values = [geometric_mean(found), min(found), max(found)] if found else []
            lines.append(
                [
                    Cell(op, look="name"),
                    direction,
                    dtype,
                    choices,
                    str(len(of)),
                    str(len(found)),
                    *(Cell(factor(value), look="bad" if value < 1 else "") for value in values),
                    *(Cell(NOT_MEASURED, look="quiet") for _ in range(3 - len(values))),
                    Cell(str(lost), look="bad" if lost else ""),
                ]
            )
    columns = [*names("op", "direction", "dtype", "automatic choice"), *numbers("cases", "measured")]
    columns += numbers("geometric mean", "worst", "best", "slower, warm or cold")
    note = (
        "Speed-up of the automatic choice over eager, in the cache; where the choice is eager itself it counts as 1. "
        "Slower: than eager, in the cache or out of it."
    )
    return Table(columns, rows(*lines), "All ops", note)


def _op(machine: Machine, key: str, op: str, cases: list[KernelCase], of: Ceilings) -> Section:
    blocks: list[Block] = []
    for dtype in dict.fromkeys(case.label("dtype") for case in cases):
        found = [case for case in cases if case.label("dtype") == dtype]
        if any(case.ours(first(case)) for case in found):
            blocks.append(_bars(machine, op, dtype, found))
    if not blocks:
        blocks.append(
            Text("No kernel of ours has been measured for this op here: it runs in plain PyTorch.", "missing")
        )
    blocks.append(_table(op, cases, of))
    blocks.append(_kernel_names(cases))
    return Section(key, op, blocks)


def _bars(machine: Machine, op: str, dtype: str, cases: list[KernelCase]) -> Chart:
    places: dict[tuple[str, ...], str] = {}
    for case in _sorted(cases):
        places.setdefault(_place(case), _row_name(case))
    directions = [d for d in _DIRECTIONS if any(case.label("direction") == d for case in cases)] or [""]
    columns = {}
    for direction in directions:
        of = {_place(case): _bar(case) for case in cases if case.label("direction") == direction}
        columns[direction] = [of.get(place) for place in places]
    caption = f"{op}, {dtype}: speed-up over eager"
    return Chart(charts.speedups(list(places.values()), columns, f"{caption} on {machine.name}"), caption)


def _bar(case: KernelCase) -> charts.Bar:
    condition = first(case)
    ours = case.ours(condition)
    if ours is None:
        return charts.Bar(None, None, False, "", "no kernel of ours")
    gain = case.subject.gain(ours, EAGER, condition)
    if gain is None:
        results = [case.subject.result(ours), case.subject.result(EAGER)]
        refused = any(result is not None and result["failure"] for result in results)
        return charts.Bar(None, None, False, "", "refused, see below" if refused else NOT_MEASURED)
    cold = case.subject.gain(ours, EAGER, "cold") if condition == "warm" else None
    is_chosen = ours == case.chosen
    hint = f"{_row_name(case)} {case.label('direction')}: {ours} {factor(gain.value)}"
    hint += f" ({factor(gain.low)} to {factor(gain.high)})" + ("" if is_chosen else ", not chosen")
    return charts.Bar(gain, cold, is_chosen, hint)


def _table(op: str, cases: list[KernelCase], of: Ceilings) -> Fold:
    own = list(dict.fromkeys(variant for case in cases for variant in case.own()))
    columns = [*names("shape", "where"), Column("B"), *names("dtype", "direction", "cache"), *names("unit")]
    columns += numbers("eager", "library", "torch.compile", *own, "gain")
    columns += [
        Column("error ours / eager", hint="the worst output, relative, against float64"),
        Column("of copy", hint="least bytes of the case over our time, as a share of the copy's rate"),
        Column("of product", hint="operations of the case over our time, as a share of the matrix product's rate"),
        Column("peak memory ours / eager", hint="beyond what was allocated before the call"),
    ]
    bodies = [_lines(case, own, of) for case in _sorted(cases)]
    note = (
        "Medians with the 20th and 80th percentile. The automatic choice is underlined. Library: the fastest of its "
        "routes, named when pointed at. Columns of torch.compile were taken in turns with another eager; see the "
        "losing cases for that comparison. Shares above 100% in the cache mean that the cache, not memory, served it."
    )
    return Fold(f"All {count(len(cases), 'case')} of {op}", [Table(columns, bodies, note=note)])


def _lines(case: KernelCase, own: Sequence[str], of: Ceilings) -> list[list[Cell]]:
    """The rows of one case: one for each condition, or one that says why there are none."""
    conditions = case.subject.conditions()
    eager = case.subject.result(EAGER)
    span = max(1, len(conditions))
    head = [
        Cell(case.title, look="name", rows=span),
        Cell(_where(case), look="name", rows=span),
        Cell(case.label("batch"), rows=span),
        Cell(case.label("dtype"), rows=span),
        Cell(case.label("direction"), rows=span),
    ]
    if not conditions:
        why = eager["failure"] if eager else NOT_MEASURED
        blank = [Cell("") for _ in range(2 + 3 + len(own) + 5)]
        blank[2] = Cell("none", why or NOT_MEASURED, "quiet")
        return [[*head, *blank]]
    lines = []
    for index, condition in enumerate(conditions):
        ours = case.ours(condition)
        variants = [EAGER, *(case.subject.fastest(condition, kind) for kind in (is_library, is_compiled)), *own]
        medians = [time.median for v in variants if v and (time := case.subject.time(v, condition))]
        name = unit(min(medians)) if medians else "µs"
        gain = case.subject.gain(ours, EAGER, condition) if ours else None
        look = "quiet" if gain is None else "bad" if gain.value < 1 and ours == case.chosen else ""
        line = [Cell(condition), Cell(name), *(_time(case, v, condition, name) for v in variants)]
        line.append(Cell(times(gain) if ours else "", look=look))
        measured, theirs = (case.subject.result(ours) if ours else None), eager
        if index == 0:
            pair = [Cell(_pair(error, measured, theirs, "errors"), rows=span)]
            line += pair
        line += [Cell(text) for text in _shares(case, ours or EAGER, condition, of)]
        if index == 0:
            line.append(Cell(_pair(size, measured, theirs, "memory"), rows=span))
        lines.append([*(head if index == 0 else []), *line])
    return lines


def _time(case: KernelCase, variant: str | None, condition: str, name: str) -> Cell:
    """A median with its spread; for what has none, why."""
    if variant is None:
        return Cell(DASH, look="quiet")
    result, time = case.subject.result(variant), case.subject.time(variant, condition)
    if time is None:
        failure = result["failure"] if result else None
        return Cell("refused" if failure else DASH, look="bad" if failure else "quiet", hint=failure or NOT_MEASURED)
    look = "chosen" if variant == case.chosen else ""
    between = f"{in_unit(time.p20, name)}{DASH}{in_unit(time.p80, name)}"
    return Cell(in_unit(time.median, name), between, look, hint=variant)


def _pair(form: Callable[[Any], str], ours: _Kept, theirs: _Kept, field: str) -> str:
    """Ours and eager's, the latter alone where there is no kernel of ours."""
    shown = [form(result[field]) if result and result[field] else DASH for result in (ours, theirs)]
    return " / ".join(shown)


def _shares(case: KernelCase, variant: str, condition: str, of: Ceilings) -> tuple[str, str]:
    product = of.product.get(case.label("dtype"))
    found = []
    for amount, ceiling in (("bytes", of.copy), ("flops", product)):
        rate = case.rate(variant, condition, amount)
        found.append(DASH if rate is None else share(rate / ceiling if ceiling else None))
    return found[0], found[1]


def _kernel_names(cases: list[KernelCase]) -> Fold:
    """Which kernels, or on a CPU operators, each rival ran; equal lists together."""
    found: dict[tuple[str, tuple[str, ...]], list[KernelCase]] = {}
    for case in cases:
        own = case.own()
        for group in case.subject.groups:
            for variant, result in group.results.items():
                if result["kernels"] and variant not in own:
                    kept = tuple(f"{k['calls']}{TIMES} {k['name']}" for k in result["kernels"][:_NAMES_KEPT])
                    found.setdefault((variant, kept), []).append(case)
    lines = [
        [Cell(variant, look="name"), Cell("; ".join(kept), look="code"), Cell(_which(of))]
        for (variant, kept), of in sorted(found.items(), key=lambda item: item[0][0])
    ]
    note = f"The {_NAMES_KEPT} slowest of each, with their number of calls."
    return Fold(
        "What the rivals ran", [Table(names("variant", "kernels, slowest first", "cases"), rows(*lines), note=note)]
    )


def _which(cases: Sequence[KernelCase]) -> str:
    shown = list(
        dict.fromkeys(f"{c.title} B={c.label('batch')} {c.label('dtype')} {c.label('direction')}" for c in cases)
    )
    return shown[0] if len(shown) == 1 else f"{shown[0]} and {len(shown) - 1} more"


def _is_lost(case: KernelCase) -> bool:
    gains = (case.gain(condition) for condition in case.subject.conditions())
    return any(gain is not None and gain.value < 1 for gain in gains)


def _choice(case: KernelCase) -> str:
    return case.chosen or "not recorded"


def _place(case: KernelCase) -> tuple[str, ...]:
    return (
        tuple(case.label(name) for name in ("model", "place", "shape", "batch"))
        if case.label("shape")
        else (case.title,)
    )


def _where(case: KernelCase) -> str:
    """`L stage 1`."""
    return " ".join(filter(None, (case.label("model").removeprefix("ConvNeXt-"), case.label("place"))))


def _row_name(case: KernelCase) -> str:
    shape = case.title.replace("x", TIMES) if case.label("shape") else case.title
    batch = f"B={case.label('batch')}" if case.label("batch") else ""
    return "  ".join(filter(None, (_where(case), shape, batch)))


def _sorted(cases: Sequence[KernelCase]) -> list[KernelCase]:
    """By model, place and shape as they came, then by batch, dtype and direction."""
    order: dict[tuple[str, ...], int] = {}
    for case in cases:
        order.setdefault(_place(case)[:3], len(order))
    return sorted(
        cases,
        key=lambda case: (
            order[_place(case)[:3]],
            int(case.label("batch") or 0),
            case.label("dtype"),
            _DIRECTIONS.index(case.label("direction")) if case.label("direction") in _DIRECTIONS else 2,
        ),
    )
