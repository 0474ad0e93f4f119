"""Kernel cases: which variant the automatic choice takes, how it stands against its rivals, and where it loses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.report.data import COMPILED, EAGER, FUSED, OPTIMIZED, Machine, Ratio, Subject, Time, is_compiled, is_library

REFERENCE = "reference"

# What a rival is, and how its variants are known.
RIVALS: dict[str, Callable[[str], bool]] = {
    EAGER: EAGER.__eq__,
    "best library route": is_library,
    COMPILED: is_compiled,
}


@dataclass(frozen=True)
class KernelCase:
    """An op at one shape, in one direction and dtype.

    Args:
        subject: its groups.
        auto: what the dispatcher chooses, as results name it: `native`, `reference`; None where it was not kept.
    """

    subject: Subject
    auto: str | None

    def label(self, name: str) -> str:
        """A label as text; empty where there is none."""
        return str(self.subject.labels.get(name, ""))

    @property
    def title(self) -> str:
        """The shape, or where no shape was kept, the case's name."""
        return self.label("shape") or self.subject.name

    @property
    def chosen(self) -> str | None:
        """The variant that a user gets without asking; None where it is unknown."""
        return EAGER if self.auto == REFERENCE else self.auto

    def own(self) -> list[str]:
        """The variants with kernels of this package."""
        return [v for v in self.subject.variants() if v != EAGER and not is_library(v) and not is_compiled(v)]

    def ours(self, condition: str) -> str | None:
        """The automatic choice if it has a kernel; otherwise the fastest of ours, which nobody gets unasked."""
        if self.auto in self.own():
            return self.auto
        return self.subject.fastest(condition, self.own().__contains__) or next(iter(self.own()), None)

    def gain(self, condition: str) -> Ratio | None:
        """What the automatic choice gains over eager; 1 where it is eager."""
        if self.chosen is None:
            return None
        if self.chosen == EAGER:
            return None if self.subject.time(EAGER, condition) is None else Ratio(1.0, 1.0, 1.0)
        return self.subject.gain(self.chosen, EAGER, condition)

    def rate(self, variant: str | None, condition: str, amount: str) -> float | None:
        """`bytes` or `flops` of a case a second."""
        if variant is None:
            return None
        result, time = self.subject.result(variant), self.subject.time(variant, condition)
        if result is None or time is None or not result[amount]:
            return None
        return float(result[amount] / (time.median * 1e-6))


@dataclass(frozen=True)
class Loss:
    """A case in which what users get unasked is slower than something they could have.

    Args:
        what: the case.
        condition: of both times.
        choice, rival: variants.
        kind: of rival, a name in `RIVALS`.
        ours, theirs: their times, taken in turns.
        gain: below 1.
    """

    what: str
    condition: str
    choice: str
    rival: str
    kind: str
    ours: Time
    theirs: Time
    gain: Ratio


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached: bytes a second of a copy, and operations a second of a product by dtype."""

    copy: float | None
    product: dict[str, float]


def kernel_cases(machine: Machine) -> list[KernelCase]:
    """Every kernel case of a machine, in the order of measurement."""
    return [KernelCase(subject, _auto(subject)) for subject in machine.subjects("kernels")]


def losses(machine: Machine) -> list[Loss]:
    """Every case, of kernels, towers, answers and training steps, in which a rival is faster; the worst first."""
    found = [
        loss for case in kernel_cases(machine) if case.chosen for loss in _losses(case.subject, case.chosen, RIVALS)
    ]
    for suite in ("vision", "e2e", "train"):
        for subject in machine.subjects(suite):
            for variant in subject.variants():
                if variant.startswith((FUSED, OPTIMIZED)):
                    found += _losses(subject, variant, _fair_rivals(variant))
    return sorted(found, key=lambda loss: loss.gain.value)


def compared(machine: Machine) -> int:
    """How many kernel cases have a time of what users get unasked beside eager's."""
    return sum(case.gain(first(case)) is not None for case in kernel_cases(machine))


def first(case: KernelCase) -> str:
    """The condition that a case is shown by: `warm`, where it was measured."""
    return next(iter(case.subject.conditions()), "warm")


def ceilings(machine: Machine) -> Ceilings:
    """The fastest copy and products that the suite `ceilings` measured."""
    copies: list[float] = []
    products: dict[str, list[float]] = {}
    for group in machine.groups("ceilings"):
        for result in group.results.values():
            what = result["labels"].get("what")
            for times in result["times"].values() if not result["failure"] else ():
                seconds = times["median"] * 1e-6
                if what == "copy" and result["bytes"]:
                    copies.append(result["bytes"] / seconds)
                elif what == "product" and result["flops"]:
                    products.setdefault(str(result["labels"].get("dtype")), []).append(result["flops"] / seconds)
    return Ceilings(max(copies, default=None), {dtype: max(of) for dtype, of in products.items()})


def failures(machine: Machine) -> list[dict[str, Any]]:
    """The results without times, whatever their suite."""
    return [result for result in machine.data["results"] if result["failure"]]


def _auto(subject: Subject) -> str | None:
    facts = (group.results[EAGER]["facts"] for group in subject.groups if EAGER in group.results)
    return next((str(of["auto"]) for of in facts if of.get("auto")), None)


def _losses(subject: Subject, choice: str, rivals: dict[str, Callable[[str], bool]]) -> list[Loss]:
    """The fastest rival of each kind in each condition, where it is faster than the choice."""
    found = []
    for condition in subject.conditions():
        for kind, matches in rivals.items():
            candidates = [v for v in subject.variants() if matches(v) and v != choice]
            gains = {v: gain for v in candidates if (gain := subject.gain(choice, v, condition)) is not None}
            if not gains:
                continue
            rival = min(gains, key=lambda v: gains[v].value)
            both = subject.pair(choice, rival, condition)
            if both is not None and gains[rival].value < 1:
                found.append(Loss(subject.name, condition, choice, rival, kind, *both, gains[rival]))
    return found


def _fair_rivals(variant: str) -> dict[str, Callable[[str], bool]]:
    """A CUDA graph takes the launch gaps away, so one is held against what has none only if ours is one too.

    The optimized tower is one wherever there are graphs.
    """
    graph = "CUDA graph"
    has_graph = graph in variant or variant == OPTIMIZED

    def fair(matches: Callable[[str], bool]) -> Callable[[str], bool]:
        return lambda rival: matches(rival) and (graph not in rival or has_graph)

    return {kind: fair(matches) for kind, matches in RIVALS.items()}
