"""The page: every machine's sections in their order, through the template."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench.report import environment, kernels, losing, paper, profiles, roofline, towers, training
from bench.report.blocks import Key, Section
from bench.report.data import Machine
from bench.report.headline import keys


@dataclass(frozen=True)
class Measured:
    """A machine as the template shows it."""

    key: str
    machine: Machine
    keys: list[Key]
    sections: list[Section]


def render(machines: Sequence[Machine]) -> str:
    """The whole page as HTML, the same text for the same results."""
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.jinja")
    shown = [_measured(machine, f"m{index}") for index, machine in enumerate(machines, start=1)]
    return template.render(machines=shown, has_gpu=any(machine.is_gpu for machine in machines))


def _measured(machine: Machine, key: str) -> Measured:
    makers = {
        "kernels": kernels.section,
        "roofline": roofline.section,
        "losing": losing.section,
        "tower": towers.section,
        "paper": paper.section,
        "training": training.section,
        "profiles": profiles.section,
    }
    sections = [make(machine, f"{key}-{name}") for name, make in makers.items()]
    other = environment.others(machine, f"{key}-other")
    sections += [*([other] if other else []), environment.section(machine, f"{key}-environment")]
    return Measured(key, machine, keys(machine), sections)
