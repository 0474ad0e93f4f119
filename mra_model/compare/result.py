"""What a comparison found, its verdict, and its file of results."""

import datetime
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mra_model.compare.agreement import Agreement
from mra_model.compare.measure import FIRST_TOKEN, LANGUAGE_MODEL, NEXT_TOKENS, PROJECTOR, REST, VIT, Run
from mra_model.compare.peak import Peak
from mra_model.compare.subject import Subject
from mra_model.environment import commit, hardware, versions
from mra_model.timing import spread

EAGER = "eager"
FUSED = "fused"
SIDES = (EAGER, FUSED)

# A part whose medians are closer than this is neither faster nor slower.
EVEN = 0.02


@dataclass(frozen=True)
class Comparison:
    """Everything that was found.

    Attributes:
        subject: what was compared.
        backends: by side and op, which backend served.
        optimized: how the fused side was optimized, in words; None where it was not.
        agreement: how far the two agree.
        runs: by side, the timed answers, in order; the sides took turns.
        peaks: by side, peak memory.
        notes: what the reader should know, the subject's notes included.
    """

    subject: Subject
    backends: dict[str, dict[str, str]]
    optimized: list[str] | None
    agreement: Agreement
    runs: dict[str, list[Run]]
    peaks: dict[str, Peak]
    notes: list[str]


def fused_name(comparison: Comparison) -> str:
    """What to call the fused side."""
    return FUSED if comparison.optimized is None else "optimized"


def same_code(comparison: Comparison) -> tuple[str, ...]:
    """What both sides compute by the same code: a difference in these times is the machine's noise."""
    if comparison.optimized is None:
        return (VIT, PROJECTOR, LANGUAGE_MODEL, REST, NEXT_TOKENS)
    return (PROJECTOR, LANGUAGE_MODEL) + ((NEXT_TOKENS,) if comparison.subject.device.type == "cpu" else ())


def speed_ups(comparison: Comparison) -> dict[str, float]:
    """Median eager time over median fused time, for the first token, those after it, and the first one's parts."""
    found = {
        FIRST_TOKEN: speed_up(comparison, lambda run: run.first_token),
        NEXT_TOKENS: speed_up(comparison, lambda run: run.next_tokens),
    }
    return found | {part: speed_up(comparison, part_time(part)) for part in part_names(comparison)}


def verdict(comparison: Comparison) -> str:
    """One line: whether the two agree, how much faster fused is, and where it is slower."""
    agreement = comparison.agreement
    if agreement.failures:
        return f"FAILED: {'; '.join(agreement.failures)}"
    gains = speed_ups(comparison)
    same = same_code(comparison)
    slower = [f"{name} {gain:.2f}x" for name, gain in gains.items() if gain < 1 - EVEN and name not in same]
    return (
        f"OK: {fused_name(comparison)} agrees with eager and is {gains[FIRST_TOKEN]:.2f}x as fast to the first token; "
        f"slower in: {', '.join(slower) or 'nothing'}"
    )


def part_names(comparison: Comparison) -> list[str]:
    """The timed parts, in the order of computing."""
    return list(comparison.runs[EAGER][0].parts)


def part_time(name: str) -> Callable[[Run], float]:
    """What reads a part's seconds from a run."""
    return lambda run: run.parts[name]


def speed_up(comparison: Comparison, of: Callable[[Run], float]) -> float:
    """Median eager time over median fused time of what `of` reads from a run, in seconds."""
    eager, fused = (spread([of(run) for run in comparison.runs[side]]).median for side in SIDES)
    return eager / max(fused, 1e-12)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The whole result: what was compared, where, by which command, every sample, and the judgement."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        "subject": comparison.subject.describe(),
        "notes": comparison.notes,
        "backends": comparison.backends,
        "optimized": comparison.optimized,
        "verdict": verdict(comparison),
        "speed_ups": speed_ups(comparison),
        "agreement": comparison.agreement.as_dict(),
        "peak_memory": {side: peak.as_dict() for side, peak in comparison.peaks.items()},
        "samples": {side: [_sample(run) for run in of] for side, of in comparison.runs.items()},
    }


def _sample(run: Run) -> dict[str, Any]:
    return {
        "first_token_s": run.first_token,
        "next_tokens_s": run.next_tokens,
        "tokens_per_s": run.tokens_per_second,
        "reached_s": run.reached,
        "parts_s": run.parts,
        "tokens": run.tokens,
        "margins": run.margins,
    }
