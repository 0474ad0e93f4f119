"""Training steps of the whole model, and the hours that they imply."""

from bench.report.blocks import Cell, Section, Table, Text, names, numbers
from bench.report.cells import gained, optional, timed
from bench.report.data import Machine
from bench.report.numbers import duration, plain, size

_STEP = "step"


def section(machine: Machine, key: str) -> Section:
    """The section of a machine's training steps."""
    subjects = machine.subjects("train")
    if not subjects:
        return Section(key, "Training", [Text("Not measured. `python -m bench train` measures it.", "missing")])
    bodies = []
    notes: dict[str, None] = {}
    for subject in subjects:
        lines = []
        for variant in subject.variants():
            result, time, of = subject.result(variant), subject.time(variant, _STEP), subject.labels
            assert result is not None, f"{variant} is one of the subject's variants"
            facts, parts = result["facts"], result["parts"] if time else {}
            notes |= {str(facts[name]): None for name in ("hours are", "not in the step") if name in facts}
            hours = facts.get("hours estimate") if time else None
            lines.append(
                [
                    Cell(f"stage {of.get('stage', '?')}", look="name"),
                    Cell(str(of.get("language", ""))),
                    Cell(str(of.get("side", ""))),
                    Cell(str(of.get("batch", ""))),
                    Cell(str(of.get("dtype", ""))),
                    Cell("yes" if of.get("checkpointing") else "no"),
                    Cell(variant),
                    timed(time, result),
                    gained(subject, variant, _STEP),
                    *(optional(duration(parts[name]) if name in parts else None) for name in ("forward", "backward")),
                    Cell(size(facts.get("peak bytes"))),
                    optional(None if hours is None else f"{plain(hours)} h"),
                ]
            )
        bodies.append(lines)
    columns = [*names("stage", "language model"), *numbers("side", "B"), *names("dtype", "checkpointing", "variant")]
    columns += numbers(_STEP, "gain", "forward", "backward", "peak memory", "hours, an estimate")
    note = "Hours are an estimate from the step's time, not a measurement. " + " ".join(_sentence(n) for n in notes)
    return Section(key, "Training", [Table(columns, bodies, "A training step", note.strip())])


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
