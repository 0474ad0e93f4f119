"""`apply_mra_kernels` on timm's own models, where timm is installed."""

from collections.abc import Iterator

import pytest
import torch
from models_of_others import randomize
from op_calls import threads

from mra_kernels import apply_mra_kernels
from mra_kernels.testing import relative_error

timm = pytest.importorskip("timm")

BLOCK = ("depthwise_conv_norm", "linear_gelu", "linear_scale_residual")
SMALL = {"dims": (8, 12, 16, 20), "depths": (1, 2, 1, 1)}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


def run(model: torch.nn.Module, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 64, 96, requires_grad=True)
    output = model(x)
    output = output[-1] if isinstance(output, list) else output
    return [output, *torch.autograd.grad(output.square().sum(), [x, *model.parameters()], allow_unused=True)]


def assert_near(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        assert a is None or relative_error(a, e) < 1e-4


@pytest.mark.parametrize("name", ["convnext_tiny", "convnext_xxlarge", "convnextv2_tiny"])
def test_results_and_gradients(name: str) -> None:
    model = randomize(timm.create_model(name, num_classes=7, **SMALL)).eval()
    expected, keys = run(model), list(model.state_dict())
    report = apply_mra_kernels(model)
    assert report.counts == {"stem": 1, "block": 5, "downsample": 3}
    assert {r.ops for r in report.replaced.values() if r.kind == "block"} == {BLOCK}
    left = {what for reasons in report.left.values() for what in reasons}
    assert left == ({"GRN"} if "v2" in name else set())
    assert_near(run(model), expected)
    assert list(model.state_dict()) == keys
    report.undo()
    assert torch.equal(run(model)[0], expected[0])


def test_stochastic_depth_and_checkpointing() -> None:
    model = randomize(timm.create_model("convnext_tiny", drop_path_rate=0.5, **SMALL)).train()
    expected = run(model)
    apply_mra_kernels(model)
    assert_near(run(model), expected)
    model.set_grad_checkpointing()
    assert_near(run(model), expected)


def test_features_only() -> None:
    """timm takes the stem apart: its convolution and norm run as they are."""
    model = randomize(timm.create_model("convnext_tiny", features_only=True, **SMALL)).eval()
    expected = run(model)
    assert apply_mra_kernels(model).counts == {"block": 5, "downsample": 3}
    assert_near(run(model), expected)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("convnext_atto", {}, "conv_mlp=True"),
        ("convnext_atto_ols", {}, "it is not a convolution and a norm, but Conv2d, Conv2d, LayerNorm2d"),
        ("convnext_tiny", {"act_layer": "gelu_tanh"}, "mlp.act is a GELUTanh, not GELU"),
        ("convnext_tiny", {"kernel_sizes": 5}, "conv_dw has a kernel of 5 x 5, not 7 x 7"),
        ("convnext_tiny", {"conv_bias": False}, "conv_dw lacks a weight or a bias"),
        ("convnext_tiny", {"norm_layer": "rmsnorm"}, "norm is a RmsNorm, not a known LayerNorm"),
        ("convnext_tiny", {"output_stride": 16}, "conv_dw has dilation (2, 2)"),
    ],
)
def test_left_alone(name: str, options: dict, reason: str) -> None:
    model = randomize(timm.create_model(name, **SMALL, **options)).eval()
    expected = run(model)
    report = apply_mra_kernels(model)
    found = [why for reasons in report.left.values() for why in reasons.values()]
    assert any(why.startswith(reason) for why in found), found
    assert_near(run(model), expected)
