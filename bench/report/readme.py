"""The summary in the README, between two markers."""

from collections.abc import Sequence

from bench.report.data import Machine
from bench.report.headline import keys
from bench.report.numbers import NOT_MEASURED

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

_SPECIAL = str.maketrans({"|": "\\|", "<": "&lt;", ">": "&gt;", "\n": " "})


class NoMarkers(RuntimeError):
    """The README has no place for the summary."""


def replace(text: str, summary: str) -> str:
    """A README with the summary between its markers.

    Raises:
        NoMarkers: there are none, more than one pair, or they are the wrong way round.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or end < begin:
        raise NoMarkers(
            f"the README must hold {BEGIN} and after it {END}, each once and on a line of its own, "
            f"where the summary belongs; found {text.count(BEGIN)} and {text.count(END)}"
        )
    return f"{text[: begin + len(BEGIN)]}\n{summary}{text[end:]}"


def summarize(machines: Sequence[Machine], link: str) -> str:
    """The key numbers of each machine in Markdown.

    Args:
        machines: the newest results of each.
        link: to the page, from the README.
    """
    lines: list[str] = []
    for machine in machines:
        changed = ", with local changes" if machine.data["dirty"] else ""
        lines += [
            f"**{_text(machine.name)}**, {machine.date}, commit `{machine.commit}`{changed}:",
            "",
            "| measured | | |",
            "| --- | ---: | --- |",
            *(f"| {_text(key.title)} | {_text(key.value)} | {_text(key.detail)} |" for key in keys(machine)),
            "",
        ]
    if not any(machine.is_gpu for machine in machines):
        lines += [f"**GPU**: {NOT_MEASURED}; `python -m bench gpu` measures it.", ""]
    if not machines:
        lines += [f"**CPU**: {NOT_MEASURED}; `python -m bench all` measures it.", ""]
    lines += [f"Every case, with spreads, errors and what we lose: [the report]({link}).", ""]
    return "\n".join(lines)


def _text(text: str) -> str:
    return text.translate(_SPECIAL)
