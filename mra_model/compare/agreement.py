"""Whether two ways of computing agree."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mra_model.compare.measure import Outputs, Run

# ||fused - eager|| / ||eager|| of the vision features.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Agreement:
    """How far fused and eager agree.

    Attributes:
        features, logits: relative difference, ||fused - eager|| / ||eager||.
        tolerance: what `features` may be.
        tokens: how many tokens each answer has.
        compared: how many of them count. In float32 all do; in narrower dtypes those before the first step at which
            eager's own two best logits are closer, relative to the largest magnitude, than `tolerance`.
        first_difference: the first step at which the answers differ, counting from 0; None where they are equal.
        failures: what is wrong, in words; empty where the two agree.
    """

    features: float
    logits: float
    tolerance: float
    tokens: int
    compared: int
    first_difference: int | None
    failures: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: such a difference is a string."""
        numbers = {"features": self.features, "logits": self.logits}
        return asdict(self) | {name: x if math.isfinite(x) else str(x) for name, x in numbers.items()}


def judge(
    eager: Outputs, fused: Outputs, eager_runs: Sequence[Run], fused_runs: Sequence[Run], dtype: torch.dtype
) -> Agreement:
    """Compares features, logits and the answers of every run.

    Args:
        eager, fused: outputs at every position.
        eager_runs, fused_runs: timed answers, the same number of both, at least one.
        dtype: that was computed in.
    """
    tolerance = TOLERANCES[dtype]
    features = relative_difference(fused.vision_features, eager.vision_features)
    logits = relative_difference(fused.logits, eager.logits)
    count = len(eager_runs[0].tokens)
    exact = dtype == torch.float32
    pairs = list(zip(eager_runs, fused_runs, strict=True))
    differences = [found for pair in pairs if (found := _first_difference(*pair)) is not None]
    compared = count if exact else min(_clear_steps(run.margins, tolerance) for run in eager_runs)
    first = min(differences, default=None)
    failures = []
    # Written so that a NaN fails.
    if not features <= tolerance:
        failures.append(f"vision features differ by {features:.2e}, more than {tolerance:.0e}")
    if not math.isfinite(logits):
        failures.append("logits are not finite")
    if first is not None and first < compared:
        failures.append(f"the answers differ from token {first + 1} on")
    return Agreement(features, logits, tolerance, count, compared, first, tuple(failures))


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, summed in float64; NaN where either has one."""
    difference = torch.linalg.vector_norm(actual.float() - expected.float(), dtype=torch.float64)
    return float(difference / torch.linalg.vector_norm(expected.float(), dtype=torch.float64))


def _first_difference(eager: Run, fused: Run) -> int | None:
    pairs = zip(eager.tokens, fused.tokens, strict=True)
    return next((step for step, (one, other) in enumerate(pairs) if one != other), None)


def _clear_steps(margins: Sequence[float], tolerance: float) -> int:
    """How many steps come before the first one whose margin is under the tolerance."""
    return next((step for step, margin in enumerate(margins) if margin < tolerance), len(margins))
