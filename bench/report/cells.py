"""Cells that several tables share: a time with its spread or why there is none, and what is gained over eager."""

from typing import Any

from bench.report.blocks import Cell
from bench.report.data import EAGER, Subject, Time
from bench.report.numbers import DASH, NOT_MEASURED, duration, spread, times


def timed(time: Time | None, result: dict[str, Any]) -> Cell:
    """A median with its spread; without one, the reason that the result gives."""
    if time is not None:
        return Cell(duration(time.median), spread(time))
    if result["failure"]:
        return Cell("no time", result["failure"].strip().splitlines()[-1], "bad", hint=result["failure"])
    return Cell(NOT_MEASURED, look="quiet")


def gained(subject: Subject, variant: str, condition: str) -> Cell:
    """Eager's time over the variant's, where both took turns."""
    gain = subject.gain(variant, EAGER, condition)
    if variant == EAGER or gain is None:
        return Cell("" if variant == EAGER else DASH, look="quiet")
    return Cell(times(gain), look="bad" if gain.value < 1 else "")


def optional(text: str | None) -> Cell:
    """A quiet dash where there is nothing."""
    return Cell(DASH, look="quiet") if text is None else Cell(text)
