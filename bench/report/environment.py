"""What the numbers depend on, how each step ended, and results that no other section shows."""

from typing import Any

from bench.record import DONE
from bench.report.blocks import Block, Cell, Section, Table, Text, names, numbers, rows
from bench.report.data import Machine, time_of
from bench.report.numbers import DASH, NOT_MEASURED, error, median, share, size, spread

# Suites that have a section of their own.
SHOWN = ("kernels", "vision", "e2e", "train", "profile")

# What a step keeps besides its conditions.
_OWN_COLUMN = ("state", "why", "seconds", "date", "others")


def section(machine: Machine, key: str) -> Section:
    """The section of a machine's environment."""
    data = machine.data
    head: dict[str, str] = {
        "device": machine.name,
        "commit": data["commit"],
        "tree": data["tree"],
        "schema": str(data["schema"]),
    }
    head["source"] = "with local changes" if data["dirty"] else "as committed"
    facts = list(head.items())
    facts += _flat({name: value for name, value in data["machine"].items() if name != "device"})
    blocks: list[Block] = [
        Table(names("what", "value"), rows(*([Cell(name, look="name"), value] for name, value in facts)), "Machine"),
        Table(
            names("date", "command"),
            rows(*([run["date"], Cell(run["command"], look="code")] for run in data["runs"])),
            "Commands",
        ),
        _steps(data["steps"]),
    ]
    if machine.older:
        older = ", ".join(path.parent.name for path in machine.older)
        blocks.append(Text(f"Older results of this machine, which this page does not show: {older}."))
    return Section(key, "Environment", blocks)


def others(machine: Machine, key: str) -> Section | None:
    """Results of the remaining suites; None where there are none."""
    found = machine.unlabelled(SHOWN)
    if not found:
        return None
    lines = []
    for result in found:
        failed = bool(result["failure"])
        for condition, of in ({} if failed else result["times"]).items():
            time = time_of(of)
            lines.append([*_name(result), condition, Cell(median(time), spread(time)), error(result["errors"]), ""])
        if failed or not result["times"]:
            facts = ", ".join(f"{name} {value}" for name, value in _flat(result["facts"]))
            text = str(result["failure"]).strip().splitlines()[-1] if failed else facts
            lines.append([*_name(result), "", Cell("", look="quiet"), "", text])
    columns = [*names("step", "case", "variant", "condition"), *numbers("time", "error"), *names("")]
    text = "Ceilings, products alone and checks, which the sections above build on."
    return Section(key, "Other measurements", [Text(text), Table(columns, rows(*lines))])


def _name(result: dict[str, Any]) -> list[Cell | str]:
    return [result["step"], Cell(result["case"], look="name"), result["variant"]]


def _steps(steps: dict[str, dict[str, Any]]) -> Table:
    """How each step ended, the ones that failed or were left out first."""
    lines = []
    for name, step in sorted(steps.items(), key=lambda item: item[1]["state"] == DONE):
        why = str(step.get("why") or "").strip()
        rest = {key: value for key, value in step.items() if key not in _OWN_COLUMN}
        lines.append(
            [
                Cell(name, look="name"),
                Cell(step["state"], look="" if step["state"] == DONE else "bad"),
                Cell(f"{step['seconds']} s" if step.get("seconds") is not None else DASH),
                Cell(DASH if step.get("others") is None else share(step["others"])),
                Cell(why.splitlines()[-1] if why else "", hint=why),
                ", ".join(f"{key} {value}" for key, value in _flat(rest)),
            ]
        )
    columns = [*names("step", "state"), *numbers("seconds", "other programs"), *names("why", "conditions")]
    note = f"Other programs: the share of the processor that they used. A step that is not here is {NOT_MEASURED}."
    return Table(columns, rows(*lines), "Steps", note)


def _flat(facts: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested facts as lines; what is unknown is left out."""
    found: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            found += _flat(value, f"{before}{name}, ")
        elif value is not None:
            found.append((f"{before}{name}".replace("_bytes", "").replace("_", " "), _text(name, value)))
    return found


def _text(name: str, value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(one) for one in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return size(value) if isinstance(value, int) and name.endswith("bytes") else str(value)
