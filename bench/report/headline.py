"""The numbers of the headline, for the page and for the README."""

from bench.report import paper, towers
from bench.report.blocks import Key
from bench.report.cases import compared, first, kernel_cases, losses
from bench.report.data import EAGER, FUSED, OPTIMIZED, Machine, Ratio, Subject, geometric_mean
from bench.report.numbers import NOT_MEASURED, count, factor, median, times

# Of the tower and the answer in the headline.
_BATCH, _SIDE = 1, 1024
_OP = "depthwise_conv_norm"


def keys(machine: Machine) -> list[Key]:
    """The key numbers of a machine, each `not measured` where there is no data."""
    return [
        _tower(machine, "forward", "Vision tower, forward"),
        _tower(machine, "training", "Vision tower, training step"),
        _first_token(machine),
        _paper(machine),
        _depthwise(machine),
        _losing(machine),
    ]


def _tower(machine: Machine, direction: str, title: str) -> Key:
    wanted = {"direction": direction, "batch": _BATCH, "side": _SIDE}
    found = [s for s in machine.subjects("vision") if wanted.items() <= s.labels.items()]
    # Without checkpointing before with it.
    found.sort(key=lambda subject: bool(subject.labels.get("checkpointing")))
    return next((key for s in found if (key := _speedup(title, s, "call", towers.describe(s)))), _missing(title))


def _first_token(machine: Machine) -> Key:
    title = f"First token, LLaVA-HR at {_SIDE}"
    subjects = machine.subjects("e2e")
    for language, dtype in paper.languages(subjects):
        subject = paper.find(_of(subjects, language, dtype), paper.HR, _SIDE)
        if subject and (key := _speedup(title, subject, paper.FIRST, f"{language}, {dtype}")):
            return key
    return _missing(title)


def _paper(machine: Machine) -> Key:
    plain, high = paper.HEADLINE
    title = f"First token, LLaVA-1.5 at {plain} / LLaVA-HR at {high}"
    subjects = machine.subjects("e2e")
    for language, dtype in paper.languages(subjects):
        found = paper.equally_optimized(_of(subjects, language, dtype), paper.HEADLINE)
        of = found.ratios
        if of[paper.FIRST] is not None:
            answers = ", ".join(f"{name} {times(of[name])}" for name in paper.LENGTHS)
            detail = f"equally optimized ({found.plain} / {found.high}), {language}, {dtype}; answers: {answers}"
            return Key(title, times(of[paper.FIRST]), detail)
    return _missing(title)


def _depthwise(machine: Machine) -> Key:
    title = f"{_OP}, forward"
    wanted = {"op": _OP, "direction": "forward"}
    cases = [case for case in kernel_cases(machine) if wanted.items() <= case.subject.labels.items()]
    gains = [gain.value for case in cases if (gain := case.gain(first(case))) is not None]
    if not gains:
        return _missing(title)
    detail = f"geometric mean over eager, {len(gains)} of {count(len(cases), 'case')}"
    ends = f", {factor(min(gains))} to {factor(max(gains))}" if len(gains) > 1 else ""
    return Key(title, factor(geometric_mean(gains)), detail + ends)


def _losing(machine: Machine) -> Key:
    title = "Losing comparisons"
    looked_at = compared(machine)
    found = losses(machine)
    if not looked_at and not any(machine.subjects(suite) for suite in ("vision", "e2e", "train")):
        return _missing(title)
    worst = f"worst {factor(found[0].gain.value)}; all are listed" if found else "none"
    return Key(title, str(len(found)), f"{count(looked_at, 'kernel case')} compared; {worst}")


def _speedup(title: str, subject: Subject, condition: str, about: str) -> Key | None:
    """Optimized against eager, or fused where nothing was optimized; None where eager or both have no time."""
    for variant in (OPTIMIZED, FUSED):
        both = subject.pair(variant, EAGER, condition)
        gain = subject.gain(variant, EAGER, condition)
        if both is not None and gain is not None:
            return Key(
                title, times(gain), f"{median(both[1])} eager, {median(both[0])} {variant}{_noise(gain)}; {about}"
            )
    return None


def _noise(gain: Ratio) -> str:
    return "" if gain.is_clear else " (spreads overlap)"


def _missing(title: str) -> Key:
    return Key(title, NOT_MEASURED, "", is_measured=False)


def _of(subjects: list[Subject], language: object, dtype: object) -> list[Subject]:
    return [s for s in subjects if (s.labels.get("language"), s.labels.get("dtype")) == (language, dtype)]
