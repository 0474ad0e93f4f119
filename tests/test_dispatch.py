"""Choosing a backend: the variable, the context manager, the reasons, and a package without torch or extension."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mra_kernels
from mra_kernels import dispatch
from mra_kernels.dispatch import (
    BACKENDS,
    Backend,
    backend_report,
    choose,
    has_kernel,
    is_reference,
    parse_preference,
    why_not,
)
from mra_kernels.native import _extension
from mra_kernels.ops import OPS
from mra_kernels.testing import make_inputs

CPU = torch.device("cpu")


def refuse(device: torch.device, dtype: torch.dtype) -> str:
    return f"nothing for {device} and {dtype}"


SERVES = Backend(max, max, lambda device, dtype: None)
REFUSES = Backend(max, max, refuse)


@pytest.fixture(autouse=True)
def _automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of this file begin with the automatic choice, whatever the environment says."""
    monkeypatch.setattr(dispatch, "_preference", None)


def test_automatic_choice_passes_over_what_cannot_serve() -> None:
    assert choose("op", {"native": REFUSES, "triton": "none yet"}, CPU, torch.float32) == "reference"
    assert choose("op", {"native": SERVES, "triton": "none yet"}, CPU, torch.float32) == "native"
    assert choose("op", {"native": REFUSES, "triton": SERVES}, CPU, torch.float32) == "triton"


def test_explicit_choice_raises_with_the_reason() -> None:
    with mra_kernels.use_backend("native"), pytest.raises(mra_kernels.BackendUnavailable) as caught:
        choose("op", {"native": REFUSES, "triton": SERVES}, CPU, torch.float16)
    message = str(caught.value)
    assert "op cannot run" in message
    assert "native: nothing for cpu and torch.float16" in message
    assert "MRA_BACKEND=native,reference" in message


def test_explicit_order_takes_the_first_that_serves() -> None:
    backends = {"native": REFUSES, "triton": SERVES}
    with mra_kernels.use_backend("native, triton"):
        assert choose("op", backends, CPU, torch.float32) == "triton"
    with mra_kernels.use_backend("native,reference"):
        assert choose("op", backends, CPU, torch.float32) == "reference"
    with mra_kernels.use_backend("reference,triton"):
        assert choose("op", backends, CPU, torch.float32) == "reference"


def test_a_kernel_that_would_be_chosen() -> None:
    """Not the reference, and not one that is only second in an explicit order."""
    entries = {"native": SERVES, "triton": "none yet"}
    op = next(iter(OPS.values()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "backends", entries)
        assert has_kernel(op.name, CPU, torch.float32)
        for name, expected in (("native,reference", True), ("reference,native", False), ("triton", False)):
            with mra_kernels.use_backend(name):
                assert has_kernel(op.name, CPU, torch.float32) == expected
        patch.setattr(op, "backends", entries | {"native": REFUSES})
        assert not has_kernel(op.name, CPU, torch.float32)


def test_all_reasons_are_told() -> None:
    with mra_kernels.use_backend("triton,native"), pytest.raises(mra_kernels.BackendUnavailable) as caught:
        choose("op", {"native": REFUSES, "triton": "no Triton kernel yet"}, CPU, torch.float32)
    assert "(triton: no Triton kernel yet; native: nothing for cpu" in str(caught.value)


@pytest.mark.parametrize("text", ["fast", "native,", "", "Reference", "native reference", "auto,native"])
def test_no_backend_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="is no backend; choose from reference, native, triton"):
        parse_preference(text, "MRA_BACKEND")
    with pytest.raises(ValueError, match="is no backend"), mra_kernels.use_backend(text):
        pass


def test_context_managers_nest_and_restore() -> None:
    with mra_kernels.use_backend("reference"):
        assert is_reference()
        with mra_kernels.use_backend("native,reference"):
            assert not is_reference()
            with mra_kernels.use_backend("auto"):
                assert not is_reference()
        assert is_reference()
        with pytest.raises(KeyError), mra_kernels.use_backend("native"):
            raise KeyError
        assert is_reference()
    assert not is_reference()


def test_reference_serves_everything() -> None:
    for op in OPS.values():
        for device in ("cpu", "cuda", "meta"):
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                assert why_not(op.backends, "reference", torch.device(device), dtype) is None


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_report_explains_every_op(device: str, dtype: torch.dtype) -> None:
    """A backend is chosen or has a reason; the choice is what a call would take."""
    report = backend_report(device, dtype)
    assert [c.op for c in report] == list(OPS)
    for choice in report:
        assert choice.chosen == choose(choice.op, OPS[choice.op].backends, torch.device(device), dtype)
        assert choice.chosen not in choice.reasons
        for backend, reason in choice.reasons.items():
            assert backend in BACKENDS
            assert len(reason) > 10


def test_report_ignores_an_explicit_choice() -> None:
    """It tells what happens by default, so a chosen backend does not change it."""
    before = backend_report()
    with mra_kernels.use_backend("reference"):
        assert [c.reasons for c in backend_report()] == [c.reasons for c in before]


def test_the_registered_op_names_a_backend_that_is_missing() -> None:
    inputs = make_inputs("adapter_gate", 1, 4, 2)
    for backend, reason in (("native", "no native kernel yet"), ("fast", "there is no such backend")):
        with pytest.raises(RuntimeError, match=f"mra::adapter_gate on backend {backend}: {reason}"):
            torch.ops.mra.adapter_gate(*inputs.values(), backend)


def test_extension_absent_and_broken_are_different(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "find_spec", lambda name: None)
    assert _extension._load() == (None, "the compiled extension is absent: build it with pip install .")

    def fail(name: str) -> None:
        raise ImportError("undefined symbol: cudaMalloc")

    monkeypatch.setattr(_extension, "find_spec", lambda name: object())
    monkeypatch.setattr(_extension, "import_module", fail)
    extension, problem = _extension._load()
    assert extension is None
    assert problem is not None
    assert "broken (undefined symbol: cudaMalloc)" in problem


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cpu", torch.float16, "no native cpu kernel for float16, only for float32"),
        ("cpu", torch.float64, "no native cpu kernel for float64, only for float32"),
        ("cuda", torch.float32, "no native CUDA kernel yet"),
        ("meta", torch.float32, "no native kernels for device type meta"),
    ],
)
def test_native_reasons(device: str, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "PROBLEM", None)
    assert _extension.unsupported(torch.device(device), dtype, (torch.float32,)) == reason


def test_native_reasons_without_an_extension_or_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "PROBLEM", None)
    monkeypatch.setattr(_extension, "HAS_CUDA", False)
    cuda = _extension.unsupported(torch.device("cuda"), torch.float32, (), (torch.float32,))
    assert cuda is not None
    assert "MRA_CUDA=on" in cuda
    monkeypatch.setattr(_extension, "PROBLEM", "the compiled extension is absent")
    assert _extension.unsupported(CPU, torch.float32, (torch.float32,)) == "the compiled extension is absent"


def python(code: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "MRA_BACKEND"} | variables
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


def test_environment_variable() -> None:
    """Read once, at import: chosen, a list, wrong, empty."""
    code = "import json, mra_kernels.dispatch as d; print(json.dumps([d._preference, d.is_reference()]))"
    assert json.loads(python(code, MRA_BACKEND="reference").stdout) == [["reference"], True]
    assert json.loads(python(code, MRA_BACKEND="native,reference").stdout) == [["native", "reference"], False]
    assert json.loads(python(code, MRA_BACKEND="").stdout) == [None, False]
    wrong = python(code, MRA_BACKEND="cuda")
    assert wrong.returncode != 0
    assert "MRA_BACKEND='cuda': 'cuda' is no backend; choose from reference, native, triton" in wrong.stderr


def test_import_without_torch() -> None:
    """The package says what is missing; `build_info` does not need torch."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import mra_kernels\n"
        "try: mra_kernels.build_info(); print('built')\n"
        "except ImportError as error: print('no extension')\n"
        "try: mra_kernels.linear_gelu\n"
        "except ImportError as error: print(error)\n"
        "try: mra_kernels.nonsense\n"
        "except AttributeError as error: print(error)\n"
    )
    lines = python(code).stdout.splitlines()
    assert lines[0] == ("built" if _extension.PROBLEM is None else "no extension")
    assert lines[1] == "mra_kernels.linear_gelu needs torch, which is not installed: pip install 'torch>=2.11'"
    assert lines[2] == "module 'mra_kernels' has no attribute 'nonsense'"


class TestUnwatchedCalls:
    """A call that nothing watches skips PyTorch's dispatcher; whatever must see the op still does."""

    @pytest.fixture
    def seen(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """By which way the calls went."""
        op, ways = OPS["depthwise_conv_norm"], []
        kernel, dispatched = op.backends["native"], op._forward_op

        def forward(*args: Any) -> Any:
            ways.append("kernel")
            return kernel.forward(*args)

        def through_dispatcher(*args: Any) -> Any:
            ways.append("dispatcher")
            return dispatched(*args)

        monkeypatch.setitem(op.backends, "native", replace(kernel, forward=forward))
        monkeypatch.setattr(op, "_forward_op", through_dispatcher)
        return ways

    def inputs(self) -> list[Any]:
        return list(make_inputs("depthwise_conv_norm", 1, 3, 4, 8).values())

    def test_alone(self, seen: list[str]) -> None:
        inputs = self.inputs()
        inputs[1].requires_grad_()
        with torch.no_grad():
            OPS["depthwise_conv_norm"](*inputs)
        assert seen == ["kernel"]

    def test_recorded(self, seen: list[str]) -> None:
        inputs = self.inputs()
        inputs[1].requires_grad_()
        assert OPS["depthwise_conv_norm"](*inputs).requires_grad
        assert seen == ["kernel"]

    def test_mode_profiler_and_subclass(self, seen: list[str]) -> None:
        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return func(*args, **(kwargs or {}))

        class Subclass(torch.Tensor):
            pass

        with Mode():
            OPS["depthwise_conv_norm"](*self.inputs())
        with torch.profiler.profile() as trace:
            OPS["depthwise_conv_norm"](*self.inputs())
        assert "mra::depthwise_conv_norm" in {event.key for event in trace.key_averages()}
        x, *others = self.inputs()
        OPS["depthwise_conv_norm"](x.as_subclass(Subclass), *others)
        assert seen == ["dispatcher", "kernel"] * 3
