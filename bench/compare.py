"""One case, several variants: each checked against float64, profiled, and timed in turn with the others."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.memory import peak
from bench.step import Result, Run
from bench.timing import Call, call_times, kernel_names, kernel_times
from mra_kernels.testing import relative_error, ulp

Tensors = Tensor | Sequence[Tensor]

# Names kept of what a variant ran; the rest is counted.
MOST_KERNELS = 16


@dataclass(frozen=True)
class Case:
    """What is compared.

    Args:
        name: what is computed, and at which shape.
        labels: see `Result`.
        variants: by name, the baseline first. Each returns its outputs.
        outputs: their names.
        exact: the same outputs in float64.
        bytes, flops: see `Result`.
        allowed: how many times the baseline's error a variant may have, and an ulp of `dtype` more, before its times
            are refused; None for any.
        dtype: that is computed in.
        whole: time whole calls, launch gaps included, instead of kernels by graph replay.
        slack: by output, what its error may be beyond that, as where it is a sum over many rows.
        checked: picks from a variant's outputs those, or the parts of them, that `exact` gives.
        facts: by variant, see `Result`.
        parts: by variant, measures `Result.parts`, apart from the times.
    """

    name: str
    variants: dict[str, Callable[[], Tensors]]
    outputs: tuple[str, ...]
    exact: Callable[[], Tensors]
    bytes: int | None = None
    flops: int | None = None
    allowed: float | None = None
    dtype: torch.dtype = torch.bfloat16
    whole: bool = False
    labels: dict[str, str | int | bool] = field(default_factory=dict)
    slack: dict[str, float] = field(default_factory=dict)
    checked: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    parts: dict[str, Callable[[], dict[str, float]]] = field(default_factory=dict)


def measure(run: Run, case: Case) -> dict[str, Result]:
    """Records and returns a result for each variant; one that raises, or is wrong, has a failure instead of times."""
    errors, failures = check(case)
    good: dict[str, Call] = {name: call for name, call in case.variants.items() if name not in failures}
    kernels = {name: kernel_names(call, run.device) for name, call in good.items()}
    memory = {name: peak(call, run.device) for name, call in good.items()}
    parts = {name: parts() for name, parts in case.parts.items() if name in good}
    timed = call_times if case.whole else kernel_times
    times = timed(good, run.device, once=run.rehearsal) if good else {}
    results = {}
    for name in case.variants:
        finite = {output: error for output, error in errors.get(name, {}).items() if math.isfinite(error)}
        results[name] = Result(
            case=case.name,
            variant=name,
            labels=case.labels,
            times=times.get(name, {}),
            parts=parts.get(name, {}),
            errors=finite,
            bytes=case.bytes,
            flops=case.flops,
            memory=memory.get(name),
            kernels=kernels.get(name, [])[:MOST_KERNELS],
            launches=sum(kernel["calls"] for kernel in kernels.get(name, [])),
            failure=failures.get(name),
            facts=case.facts.get(name, {}),
        )
        run.record(results[name])
    return results


def check(case: Case) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Calls each variant once: its errors by output, and why its times must not be shown, where that is so."""
    exact = _as_list(case.exact())
    errors: dict[str, dict[str, float]] = {}
    failures: dict[str, str] = {}
    for name, call in case.variants.items():
        try:
            errors[name] = _errors(case.outputs, case.checked(_as_list(call())), exact)
        except (RuntimeError, NotImplementedError) as error:
            # A library that refuses a shape, or has too little memory for it, is a finding about the library.
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return errors, failures | _too_wrong(case, errors)


def _errors(names: tuple[str, ...], outputs: Sequence[Tensor], exact: list[Tensor]) -> dict[str, float]:
    found = {}
    for name, value, truth in zip(names, outputs, exact, strict=True):
        if value.shape != truth.shape:
            raise RuntimeError(f"{name} has shape {tuple(value.shape)}, but must have {tuple(truth.shape)}")
        found[name] = relative_error(value, truth)
    return found


def _too_wrong(case: Case, errors: dict[str, dict[str, float]]) -> dict[str, str]:
    """Why a variant's times must not be shown: an output that is not finite, or much worse than the baseline's."""
    baseline = errors.get(next(iter(case.variants)), {})
    found = {}
    for name, of in errors.items():
        for output, error in of.items():
            own = baseline.get(output, 0.0)
            if not math.isfinite(error):
                found[name] = f"wrong: {output} is not finite"
            elif case.allowed is not None and error > case.allowed * own + ulp(case.dtype) + case.slack.get(
                output, 0.0
            ):
                found[name] = f"wrong: {output} has error {error:.2e}, the baseline {own:.2e}"
    return found


def _as_list(outputs: Tensors) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
