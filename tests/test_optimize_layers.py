"""The ViT's layers of `optimize`: the MLP by silu, sums in one kernel with a LayerNorm, and what must not be joined."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny_config
from test_optimize import look, pictures, plainly
from test_optimize_parts import OtherLayer
from torch import Tensor, nn

import mra_kernels
from bench.suites.launches import LaunchCounter
from mra_kernels.testing import relative_error, ulp
from mra_model import MraVisionModel, build_model, optimize
from mra_model.optimization import layers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers compute as on a GPU whose `add_norm` has a kernel. What is joined is noted: the rows of each call."""
    calls: list[int] = []

    def add_norm(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(x.shape[:-1].numel())
        return mra_kernels.add_norm(x, *rest)

    monkeypatch.setattr(layers, "on_cpu", lambda _: False)
    monkeypatch.setattr(layers, "has_kernel", lambda *_: True)
    monkeypatch.setattr(layers, "add_norm", add_norm)
    return calls


class TestSteps:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("on_cpu", [True, False])
    def test_activate(
        self, tower: MraVisionModel, dtype: torch.dtype, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(layers, "on_cpu", lambda _: on_cpu)
        mlp, x = tower.low.layers[0].mlp.double(), torch.randn(2, 5, 32, dtype=torch.float64)
        exact = mlp.activation_fn(mlp.fc1(x))
        mlp, x = mlp.to(dtype), x.to(dtype)
        with torch.no_grad():
            own = relative_error(mlp.activation_fn(mlp.fc1(x)), exact)
            for bias in (None, layers.SHARPNESS * mlp.fc1.bias):
                hidden, share = layers.activate(mlp, x, bias)
                assert hidden.dtype == dtype
                assert relative_error(share * hidden.double(), exact) < 2 * own + ulp(dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("share", [1.0, 0.6])
    @pytest.mark.parametrize("has_norm", [True, False])
    @pytest.mark.parametrize("has_kernel", [True, False])
    def test_add_linear(
        self, dtype: torch.dtype, share: float, has_norm: bool, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(layers, "has_kernel", lambda *_: has_kernel)
        linear, norm = nn.Linear(12, 16).to(dtype), nn.LayerNorm(16, eps=0.1).to(dtype)
        for parameter in (*linear.parameters(), *norm.parameters()):
            nn.init.normal_(parameter)
        x, hidden = torch.randn(2, 5, 16).to(dtype), torch.randn(2, 5, 12).to(dtype)
        before = x.clone()
        wide = linear.weight.double(), linear.bias.double()
        exact = x.double() + F.linear(share * hidden.double(), *wide)
        with torch.no_grad():
            total, normed = layers.add_linear(x, hidden, linear, norm if has_norm else None, share)
        assert torch.equal(x, before)
        assert relative_error(total, exact) < 2 * ulp(dtype)
        assert (normed is not None) == has_norm
        if has_norm:
            expected = F.layer_norm(total.double(), (16,), norm.weight.double(), norm.bias.double(), norm.eps)
            assert relative_error(normed, expected) < 2 * ulp(dtype)


class TestJoined:
    """A tower with three layers a quarter."""

    @pytest.fixture
    def deep(self) -> MraVisionModel:
        config = make_tiny_config()
        config.vision_config.low_config.num_hidden_layers = 12
        return build_model(config, seed=3).model.vision_tower

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_sums_and_norms(self, deep: MraVisionModel, dtype: torch.dtype, joined: list[int]) -> None:
        """Both sums of a layer are joined with the norm behind them; an adapter or the merge is behind a quarter's."""
        exact = plainly(deep, pictures(2))
        deep.to(dtype)
        own = relative_error(plainly(deep, pictures(2)), exact)
        optimize(deep)
        assert relative_error(look(deep, pictures(2)), exact) < max(1e-5, 2 * own)
        assert joined == [2 * 25] * (2 * 12 - 4)

    def test_biases_follow_the_weights(self, deep: MraVisionModel, joined: list[int]) -> None:
        """Nothing that is computed from a parameter outlives the call, not even one changed behind autograd's back."""
        optimize(deep)
        before = look(deep, pictures(1))
        deep.low.layers[1].mlp.fc1.bias.data.add_(1)
        deep.low.layers[2].layer_norm1.weight.data.mul_(2)
        after = look(deep, pictures(1))
        assert relative_error(after, plainly(deep, pictures(1))) < 1e-5
        assert relative_error(after, before) > 1e-3

    @pytest.mark.parametrize("number", [0, 1, 2, 4])
    def test_hooks_between_layers(self, deep: MraVisionModel, number: int, joined: list[int]) -> None:
        """One that changes what a layer reads, and one that changes what it writes."""
        optimize(deep)
        layer = deep.low.layers[number]
        layer.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0], *inputs[1:]))
        layer.register_forward_hook(lambda _, inputs, output: output - inputs[0])
        with torch.no_grad():
            expected = deep._look(pictures(1), 5)
        assert relative_error(look(deep, pictures(1)), expected) < 1e-5
        assert len(joined) == 2 * 12 - 4 - (number % 3 > 0) - (number % 3 < 2)

    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_another_layer_between(self, deep: MraVisionModel, number: int, joined: list[int]) -> None:
        deep.low.layers[number] = OtherLayer(deep.low.layers[number])
        optimize(deep)
        assert relative_error(look(deep, pictures(1)), plainly(deep, pictures(1))) < 1e-5
        assert len(joined) == 2 * 12 - 4 - 1 - (number > 0) - (number < 2)

    def test_another_activation(self, joined: list[int]) -> None:
        config = make_tiny_config()
        config.vision_config.low_config.hidden_act = "gelu"
        tower = build_model(config).model.vision_tower
        optimize(tower)
        assert relative_error(look(tower, pictures(1)), plainly(tower, pictures(1))) < 1e-5
        assert len(joined) == 4

    def test_without_a_kernel_sums_are_in_the_products(self, deep: MraVisionModel) -> None:
        """As on a CPU."""
        optimize(deep)
        with LaunchCounter() as counter:
            look(deep, pictures(1))
        assert counter.launches["mra::add_norm"] == 0
        assert counter.launches["mra::linear_scale_residual"] >= 24
