"""What `apply_mra_kernels` leaves alone in a block, a stem or a downsample: with its reason, and at the call, too.

Each change is made once before the patch, for the report, and once after it: then the call must notice.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_of_others import ConvNeXt, ConvNeXtBlock, ConvNeXtStage, DropPath, LayerNorm2d, randomize
from op_calls import threads
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mra_kernels import apply_mra_kernels
from mra_kernels.ops import OPS
from mra_kernels.testing import relative_error

CONV, UP, DOWN = "depthwise_conv_norm", "linear_gelu", "linear_scale_residual"
WIDTH = 12


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ops that were called, in order."""
    found: list[str] = []
    for name, op in OPS.items():
        serve = op._serve
        monkeypatch.setattr(op, "_serve", lambda args, n=name, s=serve: (found.append(n), s(args))[1])
    return found


class LoraLinear(nn.Linear):
    """As PEFT's: twice what the weight says."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class RmsNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:])


class Wrapped(Tensor):
    """Stands for DTensor and quantized weights."""


def put(path: str, make: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    """Puts what `make` makes of a child in its place."""

    def change(block: nn.Module) -> None:
        *parents, name = path.split(".")
        holder = block.get_submodule(".".join(parents))
        child = make(holder._modules[name])
        holder._modules[name] = child

    return change


def hook(path: str, register: str = "register_forward_hook") -> Callable[[Any], None]:
    return lambda block: getattr(block.get_submodule(path), register)(lambda *_: None)


def lora(linear: nn.Linear) -> nn.Module:
    other = LoraLinear(linear.in_features, linear.out_features)
    other.load_state_dict(linear.state_dict())
    return other


def conv(**options: Any) -> Callable[[nn.Conv2d], nn.Module]:
    standard = {"kernel_size": 7, "padding": 3, "groups": WIDTH}
    return lambda _: nn.Conv2d(WIDTH, WIDTH, **(standard | options))


def own_forward(path: str) -> Callable[[Any], None]:
    def change(block: nn.Module) -> None:
        module = block.get_submodule(path)
        module.forward = module.forward  # type: ignore[method-assign]

    return change


def wrap_weight(block: Any) -> None:
    block.mlp.fc2.weight = nn.Parameter(block.mlp.fc2.weight.detach().as_subclass(Wrapped))


def zero3(block: Any) -> None:
    block.mlp.fc1.weight.ds_id = 7


# What is changed, which ops that costs, and why the report says so.
CHANGES: dict[str, tuple[Callable[[Any], None], tuple[str, ...], str]] = {
    "forward hook": (hook("conv_dw"), (CONV,), "conv_dw has hooks"),
    "pre-hook": (hook("norm", "register_forward_pre_hook"), (CONV,), "norm has hooks"),
    "backward hook": (hook("mlp.fc1", "register_full_backward_hook"), (UP,), "mlp.fc1 has hooks"),
    "backward pre-hook": (hook("mlp.fc2", "register_full_backward_pre_hook"), (DOWN,), "mlp.fc2 has hooks"),
    "hook on act": (hook("mlp.act"), (UP,), "mlp.act has hooks"),
    "hook on drop": (hook("mlp.drop2"), (DOWN,), "mlp.drop2 has hooks"),
    "hook on shortcut": (hook("shortcut"), (DOWN,), "shortcut has hooks"),
    "hook on drop path": (hook("drop_path"), (DOWN,), "drop_path has hooks"),
    "hook on mlp": (hook("mlp"), (UP, DOWN), "mlp has hooks"),
    "own forward": (own_forward("mlp.fc1"), (UP,), "mlp.fc1 has a forward of its own"),
    "lora up": (put("mlp.fc1", lora), (UP,), "mlp.fc1 is a LoraLinear, not a Linear"),
    "lora down": (put("mlp.fc2", lora), (DOWN,), "mlp.fc2 is a LoraLinear, not a Linear"),
    "parametrization": (
        lambda block: parametrize.register_parametrization(block.mlp.fc1, "weight", nn.Identity()),
        (UP,),
        "mlp.fc1 is a ParametrizedLinear, not a Linear",
    ),
    "weight norm": (
        lambda block: nn.utils.weight_norm(block.mlp.fc2),
        (DOWN,),
        "mlp.fc2 has hooks",
    ),
    "subclass": (wrap_weight, (DOWN,), "mlp.fc2 holds a "),
    "zero 3": (zero3, (UP,), "the weights of mlp.fc1 are partitioned"),
    "kernel": (put("conv_dw", conv(kernel_size=5, padding=2)), (CONV,), "conv_dw has a kernel of 5 x 5, not 7 x 7"),
    "dilation": (put("conv_dw", conv(dilation=2, padding=6)), (CONV,), "conv_dw has dilation (2, 2)"),
    "padding": (put("conv_dw", conv(padding_mode="reflect")), (CONV,), "conv_dw has padding (3, 3) of reflect"),
    "groups": (put("conv_dw", conv(groups=1)), (CONV,), "conv_dw has 1 groups for 12 to 12 channels"),
    "conv bias": (put("conv_dw", conv(bias=False)), (CONV,), "conv_dw lacks a weight or a bias"),
    "norm bias": (put("norm", lambda n: nn.LayerNorm(WIDTH, bias=False)), (CONV,), "norm lacks a weight or a bias"),
    "norm": (put("norm", lambda n: RmsNorm()), (CONV,), "norm is a RmsNorm, not a known LayerNorm"),
    "linear bias": (put("mlp.fc1", lambda m: nn.Linear(WIDTH, 48, False)), (UP,), "mlp.fc1 lacks a weight or a bias"),
    "tanh": (put("mlp.act", lambda m: nn.GELU("tanh")), (UP,), "mlp.act is GELU approximated by tanh"),
    "act": (put("mlp.act", lambda m: nn.SiLU()), (UP,), "mlp.act is a SiLU, not GELU"),
    "mlp": (put("mlp.drop2", lambda m: nn.ReLU()), (DOWN,), "mlp.drop2 is a ReLU"),
    "shortcut": (put("shortcut", lambda m: nn.Tanh()), (DOWN,), "shortcut is a Tanh, not a Identity"),
}


def block() -> Any:
    return randomize(ConvNeXtBlock(WIDTH, drop_path=0.0)).eval()


def x() -> Tensor:
    return torch.randn(2, WIDTH, 6, 7, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_costs_its_own_op_only(name: str, when: str, calls: list[str]) -> None:
    change, lost, reason = CHANGES[name]
    module = block()
    if when == "after":
        apply_mra_kernels(module)
    torch.manual_seed(1)
    change(module)
    kept = tuple(op for op in (CONV, UP, DOWN) if op not in lost)
    if when == "before":
        report = apply_mra_kernels(module)
        assert set(report.left[""]) == set(lost)
        assert all(found.startswith(reason) for found in report.left[""].values())
        assert report.replaced[""].ops == kept
    actual = module(x())
    assert tuple(calls) == kept
    apply_mra_kernels(module).undo()
    assert type(module) is ConvNeXtBlock
    assert relative_error(actual, module(x())) < 1e-5


def test_all_of_a_block() -> None:
    reasons = {
        "conv_mlp=True: its MLP is of convolutions on maps channels first": lambda m: setattr(m, "use_conv_mlp", True),
        "has a forward of its own already": own_forward(""),
        "has parametrizations": lambda m: parametrize.register_parametrization(m, "gamma", nn.Identity()),
    }
    for reason, change in reasons.items():
        module = block()
        change(module)
        report = apply_mra_kernels(module)
        assert (report.replaced, report.left) == ({}, {"": {"": reason}})
        assert type(module).__name__ in ("ConvNeXtBlock", "ParametrizedConvNeXtBlock")


def test_an_mlp_of_another_kind_runs_as_it_is(calls: list[str]) -> None:
    """A hook on the MLP as a whole sees what it always saw."""
    module, seen = block(), []
    expected = module(x())
    apply_mra_kernels(module)
    module.mlp.register_forward_hook(lambda m, inputs, output: seen.append(output.shape))
    assert relative_error(module(x()), expected) < 1e-5
    assert (calls, seen) == ([CONV], [(2, 6, 7, WIDTH)])


def test_dropout_in_training(calls: list[str]) -> None:
    module = block()
    module.mlp.drop2.p = module.mlp.drop1.p = 0.3
    report = apply_mra_kernels(module)
    assert report.replaced[""].ops == (CONV, UP, DOWN)
    module(x())
    assert calls == [CONV, UP, DOWN]
    calls.clear()
    torch.manual_seed(4)
    actual = module.train()(x())
    assert calls == [CONV, UP]
    report.undo()
    torch.manual_seed(4)
    assert relative_error(actual, module(x())) < 1e-5


def test_hooks_on_what_is_replaced_still_run() -> None:
    module, seen = block(), []
    module.register_forward_hook(lambda *_: seen.append("before"))
    apply_mra_kernels(module)
    module.register_forward_pre_hook(lambda *_: seen.append("after"))
    module(x())
    assert sorted(seen) == ["after", "before"]


def test_hooks_of_all_modules_see_every_child(calls: list[str]) -> None:
    model = randomize(ConvNeXt()).eval()
    apply_mra_kernels(model)
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        model(torch.randn(1, 3, 32, 32))
    finally:
        handle.remove()
    assert calls == []
    assert (seen.count("Linear"), seen.count("Conv2d")) == (10, 9)


@pytest.mark.parametrize("part", ["conv_dw", "norm", "mlp.fc1", "mlp.fc2"])
def test_dtypes_that_differ_are_left_to_pytorch(part: str) -> None:
    """It refuses some, and takes a float32 norm beside bfloat16."""
    module = block().bfloat16()
    module.get_submodule(part).float()

    def outcome() -> Any:
        try:
            return module(x().bfloat16())
        except RuntimeError as error:
            return str(error)

    expected = outcome()
    apply_mra_kernels(module)
    actual = outcome()
    if isinstance(expected, str):
        assert actual == expected
    else:
        assert relative_error(actual, expected) < 0.01


def test_what_passed_is_used_again(calls: list[str]) -> None:
    """A hook that comes and goes, LoRA that is merged: the call knows."""
    module = block()
    handle = module.mlp.fc1.register_forward_hook(lambda *_: None)
    apply_mra_kernels(module)
    module(x())
    handle.remove()
    module(x())
    assert calls == [CONV, DOWN, CONV, UP, DOWN]


STAGES: dict[str, tuple[Callable[[Any], None], str, str]] = {
    "kernel": (
        put("stages.1.downsample.1", lambda m: nn.Conv2d(8, 12, 3, stride=2, padding=1)),
        "stages.1.downsample",
        "[1] has a kernel of 3 x 3, not 2 x 2",
    ),
    "stride": (
        put("stages.1.downsample.1", lambda m: nn.Conv2d(8, 12, 2, stride=1)),
        "stages.1.downsample",
        "[1] has stride (1, 1), not 2",
    ),
    "norm": (
        put("stages.1.downsample.0", lambda m: nn.BatchNorm2d(8)),
        "stages.1.downsample",
        "[0] is a BatchNorm2d, not a known LayerNorm",
    ),
    "hook": (hook("stages.1.downsample.0"), "stages.1.downsample", "[0] has hooks"),
    "stem's padding": (
        put("stem.0", lambda m: nn.Conv2d(3, 8, 4, stride=4, padding=2)),
        "stem",
        "[0] has padding (2, 2) of zeros, not 0 of zeros",
    ),
    "stem's bias": (put("stem.0", lambda m: nn.Conv2d(3, 8, 4, 4, bias=False)), "stem", "[0] lacks a weight or a bias"),
    "stem's norm": (put("stem.1", lambda m: LayerNorm2d(8, bias=False)), "stem", "[1] lacks a weight or a bias"),
    "stem's size": (put("stem.0", lambda m: nn.Conv2d(3, 8, (4, 2), 4)), "stem", "[0] has a kernel of 4 x 2"),
    "three": (
        lambda m: m.stem.append(nn.GELU()),
        "stem",
        "it is not a convolution and a norm, but Conv2d, LayerNorm2d, GELU",
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", STAGES)
def test_stem_and_downsample(name: str, when: str) -> None:
    change, path, reason = STAGES[name]
    model = randomize(ConvNeXt()).eval()
    if when == "after":
        apply_mra_kernels(model)
    torch.manual_seed(1)
    change(model)
    report = apply_mra_kernels(model)
    assert list(report.left) == [path]
    assert list(report.left[path].values()) == [reason]
    pixels = torch.randn(1, 3, 64, 64)
    actual = model(pixels)
    model = copy.deepcopy(model)
    apply_mra_kernels(model).undo()
    # After the patch the module still has our class, and its call leaves everything to its own.
    own = model.get_submodule(path)
    own.__class__ = nn.Sequential
    assert relative_error(actual, model(pixels)) < 1e-5


def test_a_downsample_without_bias_is_replaced() -> None:
    stage = randomize(ConvNeXtStage(8, 12, 1, 1e-6, 0.0, "gamma"))
    stage.downsample[1] = nn.Conv2d(8, 12, 2, stride=2, bias=False)  # type: ignore[index, operator]
    pixels = torch.randn(1, 8, 6, 6)
    expected = stage(pixels)
    assert apply_mra_kernels(stage).counts == {"downsample": 1, "block": 1}
    assert relative_error(stage(pixels), expected) < 1e-5


def test_wrapped_since_then() -> None:
    """A class put upon ours hides the own one: undo says so, and gives the others theirs back."""
    model = randomize(ConvNeXt())
    report = apply_mra_kernels(model)
    first = model.stages[0].blocks[0]  # type: ignore[union-attr, index]
    parametrize.register_parametrization(first, "gamma", nn.Identity())
    with pytest.raises(RuntimeError, match="1 modules became ParametrizedConvNeXtBlock since they were patched"):
        report.undo()
    assert type(model.stages[1].blocks[0]) is ConvNeXtBlock  # type: ignore[union-attr, index]
    parametrize.remove_parametrizations(first, "gamma")
    report.undo()
    assert type(first) is ConvNeXtBlock


def test_a_norm_in_the_other_layout() -> None:
    module = block()
    module.norm = LayerNorm2d(WIDTH)
    assert apply_mra_kernels(module).left == {"": {CONV: "norm takes maps channels first"}}
    model = ConvNeXt()
    model.stem[1] = nn.LayerNorm(8)
    assert apply_mra_kernels(model).left == {"stem": {"patch_conv_norm": "[1] takes maps channels last"}}


def test_drop_path_of_another_kind() -> None:
    module = block()
    module.drop_path = DropPath(0.2)
    assert apply_mra_kernels(module).replaced[""].ops == (CONV, UP, DOWN)
    module = block()
    module.drop_path = nn.Dropout2d(0.2)
    assert apply_mra_kernels(module).left == {"": {DOWN: "drop_path is a Dropout2d"}}
