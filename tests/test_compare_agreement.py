"""How `mra compare` judges whether two ways of computing agree."""

import pytest
import torch

from mra_model.compare import agreement, measure


def a_run(tokens: list[int], margins: list[float]) -> measure.Run:
    return measure.Run([1.0 + step for step in range(len(tokens))], {}, tokens, margins)


def judged(eager: measure.Run, fused: measure.Run, dtype: torch.dtype, factor: float = 1.0) -> agreement.Agreement:
    made = torch.Generator().manual_seed(0)
    features = torch.randn(1, 4, 8, generator=made)
    logits = torch.randn(1, 6, 9, generator=made)
    outputs = measure.Outputs(features, logits)
    return agreement.judge(outputs, measure.Outputs(features * factor, logits), [eager], [fused], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_are_held_to_the_dtypes_tolerance(dtype: torch.dtype) -> None:
    same = a_run([1, 2], [1.0, 1.0])
    allowed = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    assert not judged(same, same, dtype, 1 + 0.9 * allowed).failures
    assert judged(same, same, dtype, 1 + 1.1 * allowed).failures
    assert judged(same, same, dtype, float("nan")).failures


def test_float32_tokens_must_all_be_equal() -> None:
    eager, fused = a_run([1, 2, 3], [1.0, 1e-9, 1.0]), a_run([1, 7, 3], [1.0, 1.0, 1.0])
    found = judged(eager, fused, torch.float32)
    assert found.first_difference == 1
    assert "from token 2 on" in found.failures[0]


def test_bfloat16_tokens_count_up_to_eagers_first_tie() -> None:
    fused = a_run([1, 7, 3], [1.0, 1.0, 1.0])
    tied = judged(a_run([1, 2, 3], [1.0, 1e-3, 1.0]), fused, torch.bfloat16)
    assert (tied.compared, tied.first_difference, tied.failures) == (1, 1, ())
    later = judged(a_run([1, 2, 3], [1.0, 1.0, 1e-3]), fused, torch.bfloat16)
    assert later.compared == 2
    assert later.failures
    # Fused's own ties excuse nothing.
    assert judged(a_run([1, 2], [1.0, 1.0]), a_run([1, 7], [1.0, 1e-9]), torch.bfloat16).failures


def test_relative_difference() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0])
    assert agreement.relative_difference(a, b) == pytest.approx(10**0.5 / 5)
    assert agreement.relative_difference(b, b) == 0
