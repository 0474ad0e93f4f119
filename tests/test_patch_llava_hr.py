"""`apply_mra_kernels` on the modules of LLaVA-HR's authors: the results of their code, and calls left alone."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from models_of_others import ConvNeXt, MultiPathAlignModule, S2FStitchAlignModuleV2, randomize
from op_calls import CHOICES, require, threads
from test_modules import ADAPTER_FILES, CONVNEXT_FILES, MERGE_FILES, read
from torch import Tensor, nn

from mra_kernels import apply_mra_kernels
from mra_kernels.patching import llava_hr
from mra_kernels.testing import relative_error

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of our two functions were called."""
    found: list[str] = []
    for name in ("mr_adapter", "merge"):
        ours = getattr(llava_hr, name)
        monkeypatch.setattr(llava_hr, name, lambda *a, n=name, f=ours: (found.append(n), f(*a))[1])
    return found


def build(name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> nn.Module:
    """The authors' module that a golden file is about."""
    if name in CONVNEXT_FILES:
        dims, depths = ([int(n) for n in re.findall(r"\d+", metadata[key])] for key in ("dims", "depths"))
        return ConvNeXt(dims, depths, eps=float(metadata["norm_eps"]), scale="weight")
    low, high = tensors["input.0"].shape[-1], tensors["input.1"].shape[1]
    return S2FStitchAlignModuleV2(low, high) if name in ADAPTER_FILES else MultiPathAlignModule(low, high)


@pytest.mark.parametrize("backend", [None, *CHOICES])
@pytest.mark.parametrize("name", [*ADAPTER_FILES, *MERGE_FILES, *CONVNEXT_FILES])
def test_golden(name: str, backend: str | None, served: list[str]) -> None:
    """Outputs and all gradients, in float32, from the authors' parameters by their own names."""
    require(backend or "auto", "cpu", torch.float32)
    tensors, metadata = read(name)
    module = build(name, tensors, metadata)
    parameters = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    module.load_state_dict(parameters, strict=True)
    report = apply_mra_kernels(module, backend=backend)
    assert report.replaced
    assert not report.left
    keys = sorted(k for k in tensors if k.startswith("input."))
    inputs = [tensors[k].clone().requires_grad_() for k in keys]
    names, own = zip(*module.named_parameters(), strict=True)
    output = module(*inputs)
    gradients = torch.autograd.grad(output, [*inputs, *own], tensors["grad_output"])
    assert len(served) == (0 if name in CONVNEXT_FILES else 1)
    expected = [tensors["output"], *(tensors[f"grad_{k}"] for k in keys), *(tensors[f"grad_param.{n}"] for n in names)]
    for what, a, e in zip(["output", *keys, *names], [output, *gradients], expected, strict=True):
        assert a.shape == e.shape
        assert relative_error(a, e) < 1e-4, what


def make(kind: Callable[[int, int], nn.Module]) -> nn.Module:
    return randomize(kind(12, 10))


def tokens(count: int, width: int = 12) -> Tensor:
    return torch.randn(2, count, width, generator=torch.Generator().manual_seed(count))


def a_map(height: int, width: int) -> Tensor:
    return torch.randn(2, 10, height, width, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize("kind", [S2FStitchAlignModuleV2, MultiPathAlignModule])
@pytest.mark.parametrize("side", [2, 4, 8])
@pytest.mark.parametrize("last", [False, True])
def test_as_without(kind: Callable, side: int, last: bool, served: list[str]) -> None:
    module = make(kind)
    low, high = tokens(16), a_map(side, side)
    high = high.to(memory_format=torch.channels_last) if last else high
    expected = module(low, high)
    apply_mra_kernels(module)
    assert relative_error(module(low, high), expected) < 1e-5
    assert len(served) == 1


def test_merge_of_tokens(served: list[str]) -> None:
    module = make(MultiPathAlignModule)
    expected = module(tokens(16), tokens(64, 10))
    apply_mra_kernels(module)
    assert relative_error(module(tokens(16), tokens(64, 10)), expected) < 1e-5
    assert served == ["merge"]


@pytest.mark.parametrize("high", [(8, 2), (6, 6), (2, 8)])
def test_other_grids_are_left_to_the_module(high: tuple[int, int], served: list[str]) -> None:
    """Whatever the module makes of them, an error included, it still does."""
    low, high_map = tokens(16), a_map(*high)

    def outcome(module: nn.Module) -> Tensor | str:
        try:
            return module(low, high_map)
        except RuntimeError as error:
            return str(error)

    module = make(S2FStitchAlignModuleV2)
    expected = outcome(module)
    apply_mra_kernels(module)
    actual = outcome(module)
    assert actual == expected if isinstance(expected, str) else torch.equal(actual, expected)  # type: ignore[arg-type]
    assert served == []


@pytest.mark.parametrize("kind", [S2FStitchAlignModuleV2, MultiPathAlignModule])
def test_autocast_is_left_to_the_module(kind: Callable, served: list[str]) -> None:
    module = make(kind)
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(tokens(16), a_map(8, 8))
        apply_mra_kernels(module)
        assert torch.equal(module(tokens(16), a_map(8, 8)), expected)
    assert served == []


@pytest.mark.parametrize("kind", [S2FStitchAlignModuleV2, MultiPathAlignModule])
def test_compile(kind: Callable) -> None:
    torch._dynamo.reset()
    module = make(kind)
    expected = module(tokens(16), a_map(8, 8))
    apply_mra_kernels(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(tokens(16), a_map(8, 8)), expected) < 1e-5


def tanh_gate(module: nn.Module) -> None:
    module.gate[1] = nn.GELU(approximate="tanh")  # type: ignore[index, operator]


def hooked_gate(module: nn.Module) -> None:
    module.gate.register_forward_hook(lambda *_: None)  # type: ignore[union-attr, operator]


def wide_kernel(module: nn.Module) -> None:
    module.slow_conv = nn.Conv2d(10, 10, 3, padding=1)


def no_bias(module: nn.Module) -> None:
    module.fast_proj = type(module.fast_proj)(12, 12, *(1,) * isinstance(module.fast_proj, nn.Conv2d), bias=False)  # type: ignore[operator]


REASONS = [
    (S2FStitchAlignModuleV2, tanh_gate, "gate.1 is GELU approximated by tanh"),
    (S2FStitchAlignModuleV2, hooked_gate, "gate has hooks"),
    (S2FStitchAlignModuleV2, wide_kernel, "slow_conv has a kernel of 3 x 3, not 1 x 1"),
    (S2FStitchAlignModuleV2, no_bias, "fast_proj lacks a weight or a bias"),
    (MultiPathAlignModule, no_bias, "fast_proj lacks a weight or a bias"),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("kind", "change", "reason"), REASONS)
def test_left_alone(kind: Callable, change: Callable, reason: str, when: str, served: list[str]) -> None:
    """The report has the reason; what comes after the patch is noticed at the call."""
    module = make(kind)
    if when == "after":
        apply_mra_kernels(module)
    change(module)
    if when == "before":
        report = apply_mra_kernels(module)
        assert (report.replaced, report.left) == ({}, {"": {"": reason}})
        assert str(report) == f"left alone the model: {reason}"
    module(tokens(16), a_map(8, 8))
    assert served == []


def test_all_ops_or_none() -> None:
    module = make(S2FStitchAlignModuleV2)
    report = apply_mra_kernels(module, ops={"depthwise_conv_gelu", "adapter_gate"})
    assert not report.replaced
    assert report.left[""] == {
        "gated_projection_add, gated_resample_add, linear_gelu, linear_scale_residual, project_mean": "not among ops"
    }
