"""Results as the report reads them: the newest of each machine, grouped by what took turns.

Variants of one thing are only compared inside a group, where they were timed in turns and the same load disturbed both.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.record import load

EAGER, COMPILED, LIBRARY, FUSED, OPTIMIZED = "eager", "torch.compile", "library", "fused", "optimized"

# Labels that tell a case beside torch.compile from the same case beside the library's routes.
_APART = ("compiled", "mode")

_CONDITIONS = ("warm", "cold", "call")


@dataclass(frozen=True)
class Time:
    """Microseconds: the median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Ratio:
    """How many times faster; `low` and `high` set the percentiles of both sides against each other."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the two sides' 20th to 80th percentiles do not overlap."""
        return self.low > 1 or self.high < 1


@dataclass(frozen=True)
class Group:
    """The variants of one case, which took turns.

    Args:
        name: of the case.
        labels: of its first variant.
        results: by variant, the baseline first.
    """

    name: str
    labels: dict[str, Any]
    results: dict[str, dict[str, Any]]

    def time(self, variant: str, condition: str) -> Time | None:
        """None where the variant was not timed, or must not be trusted."""
        result = self.results.get(variant)
        if result is None or result["failure"] or condition not in result["times"]:
            return None
        return time_of(result["times"][condition])


@dataclass(frozen=True)
class Subject:
    """What was measured in one or more groups: one beside the library's routes, one beside torch.compile.

    Args:
        labels: that the groups share.
        groups: in the order of measurement.
    """

    labels: dict[str, Any]
    groups: list[Group]

    @property
    def name(self) -> str:
        """One line for readers."""
        return self.groups[0].name

    def variants(self) -> list[str]:
        """Every variant, in the order of measurement."""
        return list(dict.fromkeys(variant for group in self.groups for variant in group.results))

    def conditions(self) -> list[str]:
        """Every condition that any variant was timed in, the best known first."""
        found = {name for group in self.groups for result in group.results.values() for name in result["times"]}
        return [name for name in _CONDITIONS if name in found] + sorted(found - set(_CONDITIONS))

    def result(self, variant: str) -> dict[str, Any] | None:
        """The variant's result, one with times if there is one."""
        found = [group.results[variant] for group in self.groups if variant in group.results]
        return next((result for result in found if result["times"]), found[0] if found else None)

    def time(self, variant: str, condition: str) -> Time | None:
        """From the first group that has it."""
        times = (group.time(variant, condition) for group in self.groups)
        return next((time for time in times if time is not None), None)

    def pair(self, variant: str, rival: str, condition: str) -> tuple[Time, Time] | None:
        """The times of both in the first group that has both: only what took turns is compared."""
        for group in self.groups:
            ours, theirs = group.time(variant, condition), group.time(rival, condition)
            if ours is not None and theirs is not None:
                return ours, theirs
        return None

    def gain(self, variant: str, rival: str, condition: str) -> Ratio | None:
        """The rival's time over the variant's."""
        both = self.pair(variant, rival, condition)
        return None if both is None else ratio(both[1], both[0])

    def fastest(self, condition: str, kind: Callable[[str], bool]) -> str | None:
        """The variant of a kind with the least median."""
        times = {name: self.time(name, condition) for name in self.variants() if kind(name)}
        medians = {name: time.median for name, time in times.items() if time is not None}
        return min(medians, key=lambda name: medians[name], default=None)


@dataclass(frozen=True)
class Machine:
    """The newest results of one machine.

    Args:
        path: of its results.json.
        data: its contents.
        older: paths of the machine's other results, the newest first, which the report leaves out.
    """

    path: Path
    data: dict[str, Any]
    older: list[Path]

    @property
    def name(self) -> str:
        """The device's name."""
        return str(self.data["machine"]["device"])

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return bool(self.data["machine"]["type"] == "cuda")

    @property
    def date(self) -> str:
        """Of the last run, as 2026-11-23."""
        return _date(self.data)[:10]

    @property
    def commit(self) -> str:
        """Twelve digits of it."""
        return str(self.data["commit"])[:12]

    def groups(self, suite: str) -> list[Group]:
        """The suite's cases, in the order of measurement."""
        found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for result in self.data["results"]:
            if result["labels"].get("suite") == suite:
                found.setdefault((result["step"], result["case"]), {})[_variant(result)] = result
        return [Group(case, next(iter(of.values()))["labels"], of) for (_, case), of in found.items()]

    def subjects(self, suite: str) -> list[Subject]:
        """The suite's cases, those joined that differ only in what they were measured beside."""
        found: dict[tuple[tuple[str, Any], ...], list[Group]] = {}
        for group in self.groups(suite):
            labels = {name: value for name, value in group.labels.items() if name not in _APART}
            key = tuple(sorted(labels.items())) if len(labels) > 1 else (("case", group.name),)
            found.setdefault(key, []).append(group)
        return [Subject(groups[0].labels, groups) for groups in found.values()]

    def unlabelled(self, known: Iterable[str]) -> list[dict[str, Any]]:
        """The results of no known suite."""
        return [result for result in self.data["results"] if result["labels"].get("suite") not in set(known)]


def machines(root: Path) -> list[Machine]:
    """The newest results of each machine under `root`, the newest machine first.

    Args:
        root: holds <machine>/<date>-<commit>/results.json.

    Raises:
        ResultsMismatch: a file of another schema, or one that does not follow it.
    """
    found: dict[str, list[tuple[str, Path, dict[str, Any]]]] = {}
    for path in sorted(root.glob("*/*/results.json")):
        data = load(path)
        found.setdefault(path.parent.parent.name, []).append((_date(data), path, data))
    newest = [sorted(of, key=lambda one: one[:2], reverse=True) for of in found.values()]
    return [
        Machine(of[0][1], of[0][2], [path for _, path, _ in of[1:]])
        for of in sorted(newest, key=lambda of: of[0][:2], reverse=True)
    ]


def time_of(kept: dict[str, Any]) -> Time:
    """A time as results keep it, without its samples."""
    return Time(kept["median"], kept["p20"], kept["p80"])


def ratio(theirs: Time, ours: Time) -> Ratio:
    """How many times `ours` is faster."""
    return Ratio(theirs.median / ours.median, theirs.p20 / ours.p80, theirs.p80 / ours.p20)


def geometric_mean(values: list[float]) -> float:
    """values: at least one, each positive."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def is_library(variant: str) -> bool:
    """Whether the variant is a route through the library other than plain eager."""
    return variant.startswith((f"{LIBRARY}:", f"{EAGER},"))


def is_compiled(variant: str) -> bool:
    """Whether the variant is torch.compile in some mode."""
    return variant.startswith(COMPILED)


def _variant(result: dict[str, Any]) -> str:
    """Its name; a compiler's with its mode, where the case says so, since several modes may have been measured."""
    mode = result["labels"].get("mode")
    return f"{COMPILED} ({mode})" if mode is not None and result["variant"] == COMPILED else str(result["variant"])


def _date(data: dict[str, Any]) -> str:
    """Of the last run; empty where no run was kept."""
    return max((run["date"] for run in data["runs"]), default="")
