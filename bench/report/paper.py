"""The paper's table: what an answer costs, LLaVA-1.5 beside LLaVA-HR."""

from dataclasses import dataclass

from bench.report import charts
from bench.report.blocks import Block, Cell, Chart, Section, Table, Text, names, numbers, rows
from bench.report.cells import gained, optional, timed
from bench.report.data import EAGER, FUSED, OPTIMIZED, Machine, Ratio, Subject, Time, ratio
from bench.report.numbers import DASH, NOT_MEASURED, factor, plain, share, size, times

HR, PLAIN = "LLaVA-HR", "LLaVA-1.5"
FIRST = "first token"
LENGTHS = {"10 tokens": 10, "64 tokens": 64}

# By model, the sides that the paper's table has.
SIDES = {PLAIN: (336, 448, 672, 1022), HR: (384, 768, 1024, 1536)}

# Sides of LLaVA-1.5 and LLaVA-HR whose answers are compared.
PAIRS = ((1022, 1024), (672, 768), (336, 1024))
HEADLINE = PAIRS[0]


@dataclass(frozen=True)
class Comparison:
    """LLaVA-1.5 against LLaVA-HR.

    Args:
        plain, high: variants of both.
        ratios: by condition, the time of LLaVA-1.5 over that of LLaVA-HR.
    """

    plain: str
    high: str
    ratios: dict[str, Ratio | None]

    @property
    def is_measured(self) -> bool:
        """Whether there is any ratio."""
        return any(self.ratios.values())


def section(machine: Machine, key: str) -> Section:
    """The section of a machine's answers."""
    subjects = machine.subjects("e2e")
    if not subjects:
        return Section(key, "The paper's table", [Text("Not measured. `python -m bench e2e` measures it.", "missing")])
    blocks: list[Block] = []
    for language, dtype in languages(subjects):
        found = [s for s in subjects if (s.labels.get("language"), s.labels.get("dtype")) == (language, dtype)]
        title = f"Language model {language}, {dtype}"
        blocks.append(_table(found, title))
        blocks.append(_comparisons(found, title))
        bars = [bar for subject in _ordered(found) for bar in _bars(subject)]
        if bars:
            label = f"first token on {machine.name}, language model {language}, time by part"
            blocks.append(Chart(charts.stacks(bars, label), f"First token by part, {title[0].lower()}{title[1:]}"))
    return Section(key, "The paper's table", blocks)


def languages(subjects: list[Subject]) -> list[tuple[object, object]]:
    """Language models and dtypes, in the order of measurement."""
    return list(dict.fromkeys((s.labels.get("language"), s.labels.get("dtype")) for s in subjects))


def find(subjects: list[Subject], model: str, side: int) -> Subject | None:
    """The first subject of a model at a side."""
    return next((s for s in subjects if (s.labels.get("model"), s.labels.get("side")) == (model, side)), None)


def equally_optimized(subjects: list[Subject], sides: tuple[int, int]) -> Comparison:
    """Both models at their best where both were optimized, otherwise both eager.

    Args:
        subjects: of one language model.
        sides: of LLaVA-1.5 and of LLaVA-HR.
    """
    both = compare(subjects, sides, OPTIMIZED, OPTIMIZED)
    return both if both.is_measured else compare(subjects, sides, EAGER, EAGER)


def compare(subjects: list[Subject], sides: tuple[int, int], plain: str, high: str) -> Comparison:
    """The two models by given variants; the runs followed each other, since both do not fit beside each other."""
    models = find(subjects, PLAIN, sides[0]), find(subjects, HR, sides[1])
    ratios: dict[str, Ratio | None] = {}
    for condition in (FIRST, *LENGTHS):
        theirs = models[0].time(plain, condition) if models[0] else None
        ours = models[1].time(high, condition) if models[1] else None
        ratios[condition] = ratio(theirs, ours) if theirs and ours else None
    return Comparison(plain, high, ratios)


def _table(subjects: list[Subject], title: str) -> Table:
    bodies = []
    for model, sides in SIDES.items():
        more = [s.labels["side"] for s in subjects if s.labels.get("model") == model and "side" in s.labels]
        for side in sorted({*sides, *more}):
            bodies.append(_rows(model, side, find(subjects, model, side)))
    columns = [*names("model"), *numbers("side"), *names("variant")]
    columns += numbers("visual tokens", FIRST, "gain", *(f"tokens/s over {n}" for n in LENGTHS.values()))
    columns += numbers("peak memory", "tower's share of the first token")
    note = (
        "Tokens a second of a whole answer, from the picture's pixels on; the authors time 10 tokens. Gain: first "
        "token, against the eager that took turns with the variant. Random weights of the real shapes."
    )
    return Table(columns, bodies, title, note)


def _rows(model: str, side: int, subject: Subject | None) -> list[list[Cell]]:
    if subject is None:
        quiet = [Cell(NOT_MEASURED, look="quiet"), *(Cell(DASH, look="quiet") for _ in range(7))]
        return [[Cell(model, look="name"), Cell(str(side)), *quiet]]
    lines = []
    variants = subject.variants()
    for index, variant in enumerate(variants):
        result = subject.result(variant)
        assert result is not None, f"{variant} is one of the subject's variants"
        first, facts = subject.time(variant, FIRST), result["facts"]
        head = [Cell(model, look="name", rows=len(variants)), Cell(str(side), rows=len(variants))] if index == 0 else []
        lines.append(
            [
                *head,
                Cell(variant, str(facts.get("positions", ""))),
                Cell(str(facts.get("visual tokens", NOT_MEASURED))),
                timed(first, result),
                gained(subject, variant, FIRST),
                *(optional(_rate(subject.time(variant, name), count)) for name, count in LENGTHS.items()),
                Cell(size(facts.get("peak bytes")), hint=str(facts.get("peak bytes unknown", ""))),
                optional(_tower_share(result["parts"], first)),
            ]
        )
    return lines


def _rate(time: Time | None, count: int) -> str | None:
    return None if time is None else plain(count / (time.median * 1e-6))


def _tower_share(parts: dict[str, float], first: Time | None) -> str | None:
    return share(parts["tower"] / first.median) if first is not None and "tower" in parts else None


def _comparisons(subjects: list[Subject], title: str) -> Table:
    lines = []
    for sides in PAIRS:
        fair = equally_optimized(subjects, sides)
        for comparison, what in ((fair, "equally optimized"), (compare(subjects, sides, EAGER, FUSED), "ours, apart")):
            lines.append(
                [
                    Cell(f"{PLAIN} at {sides[0]} / {HR} at {sides[1]}", look="name"),
                    Cell(what, f"{comparison.plain} / {comparison.high}"),
                    *(
                        Cell(times(found), _range(found), "" if found else "quiet")
                        for found in comparison.ratios.values()
                    ),
                ]
            )
    columns = [*names("compared", "how"), *numbers(FIRST, *(f"answer of {name}" for name in LENGTHS))]
    note = (
        "Time of LLaVA-1.5 over time of LLaVA-HR; above 1, LLaVA-HR is faster. The two models ran one after the other, "
        'not in turns. The lines "ours, apart" also count what our kernels gain: they do not compare the models.'
    )
    return Table(columns, rows(*lines), f"LLaVA-1.5 against LLaVA-HR, {title[0].lower()}{title[1:]}", note)


def _range(found: Ratio | None) -> str:
    return "" if found is None else f"{factor(found.low)}{DASH}{factor(found.high)}"


def _ordered(subjects: list[Subject]) -> list[Subject]:
    """LLaVA-1.5 first, each by side."""
    return sorted(subjects, key=lambda s: (s.labels.get("model") == HR, int(s.labels.get("side", 0))))


def _bars(subject: Subject) -> list[charts.Stack]:
    found = []
    for variant in subject.variants():
        result, time = subject.result(variant), subject.time(variant, FIRST)
        if result is not None and result["parts"] and time is not None:
            label = f"{subject.labels.get('model')} {subject.labels.get('side')}  {variant}"
            parts = {
                name: result["parts"][name]
                for name in ("tower", "projector", "language model")
                if name in result["parts"]
            }
            found.append(charts.Stack(label, parts or result["parts"], time.median))
    return found
