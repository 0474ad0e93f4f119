"""`apply_mra_kernels`: what it computes, in models of transformers and a twin of timm's, and what stays as it was."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models_of_others import ConvNeXt, randomize
from op_calls import threads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    ConvNextBackbone,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2Model,
    DINOv3ConvNextBackbone,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
)

import mra_kernels
from mra_kernels import apply_mra_kernels
from mra_kernels.ops import OPS
from mra_kernels.testing import relative_error

SIZES: dict[str, Any] = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 1, 1]}
BLOCK = ("depthwise_conv_norm", "linear_gelu", "linear_scale_residual")

MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm's twin": ConvNeXt,
    "the authors' twin": lambda: ConvNeXt(scale="weight", eps=0.1),
    "ConvNextModel": lambda: ConvNextModel(ConvNextConfig(**SIZES)),
    "without layer scale": lambda: ConvNextModel(ConvNextConfig(**SIZES, layer_scale_init_value=0.0)),
    "ConvNextBackbone": lambda: ConvNextBackbone(ConvNextConfig(**SIZES, out_features=["stage2", "stage4"])),
    "ConvNextForImageClassification": lambda: ConvNextForImageClassification(ConvNextConfig(**SIZES, num_labels=5)),
    "ConvNextV2Model": lambda: ConvNextV2Model(ConvNextV2Config(**SIZES)),
    "DINOv3ConvNextModel": lambda: DINOv3ConvNextModel(DINOv3ConvNextConfig(**SIZES)),
    "DINOv3ConvNextBackbone": lambda: DINOv3ConvNextBackbone(
        DINOv3ConvNextConfig(**SIZES, out_features=["stage1", "stage4"])
    ),
    "inside another model": lambda: nn.ModuleDict({"trunk": ConvNeXt()}),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


def make(name: str = "timm's twin") -> nn.Module:
    return randomize(MODELS[name]()).eval()


def pixels(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 64, 96)), generator=torch.Generator().manual_seed(1))


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Everything that a model returns."""
    output = model["trunk"](x) if isinstance(model, nn.ModuleDict) else model(x)
    if isinstance(output, Tensor):
        return [output]
    values = (value for value in output.values() if value is not None)
    return [t for value in values for t in (value if isinstance(value, tuple) else (value,))]


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Results, and the gradients of the picture and of every parameter."""
    x = x.detach().requires_grad_()
    outputs = results(model, x)
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs]
    found = torch.autograd.grad(outputs, [x, *model.parameters()], grads, allow_unused=True)
    return [*outputs, *(g for g in found if g is not None)]


def assert_near(actual: list[Tensor], expected: list[Tensor], limit: float = 1e-4) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        assert relative_error(a, e) < limit


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ops that were called, in order."""
    found: list[str] = []
    for name, op in OPS.items():
        serve = op._serve
        monkeypatch.setattr(op, "_serve", lambda args, n=name, s=serve: (found.append(n), s(args))[1])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_results_and_gradients(name: str, calls: list[str]) -> None:
    model = make(name)
    expected = run(model, pixels())
    assert calls == []
    keys, modules = list(model.state_dict()), [type(m).__name__ for m in model.modules()]
    report = apply_mra_kernels(model)
    assert report.counts == {"stem": 1, "block": 5, "downsample": 3}
    assert {r.ops for r in report.replaced.values() if r.kind == "block"} == {BLOCK}
    assert_near(run(model, pixels()), expected)
    assert calls == ["patch_conv_norm", *BLOCK, "norm_patchify", *BLOCK, *BLOCK, *("norm_patchify", *BLOCK) * 2]
    assert list(model.state_dict()) == keys
    assert [type(m).__name__ for m in model.modules()] == modules
    report.undo()
    assert all(torch.equal(a, e) for a, e in zip(run(model, pixels()), expected, strict=True))


@pytest.mark.parametrize("name", ["timm's twin", "ConvNextBackbone"])
@pytest.mark.parametrize("shape", [(1, 3, 33, 70), (0, 3, 64, 64), (3, 3, 32, 32)])
def test_sizes(name: str, shape: tuple[int, ...]) -> None:
    model = make(name)
    expected = run(model, pixels(*shape))
    apply_mra_kernels(model)
    assert_near(run(model, pixels(*shape)), expected)


def test_between_blocks_maps_lie_channels_last() -> None:
    """So that nothing is copied: what a block reads is what the one before it wrote."""
    model = make()
    apply_mra_kernels(model)
    seen: list[Tensor] = []
    for module in model.modules():
        if type(module).__name__ == "ConvNeXtBlock":
            module.register_forward_hook(lambda module, inputs, output: seen.extend((*inputs, output)))
    x = model(pixels())
    assert len(seen) == 10
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (*seen, x))


def test_training_steps_and_checkpoints(tmp_path: Any) -> None:
    """An optimizer made before the patch goes on, and weights go back and forth."""
    plain, model = make().train(), make().train()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (plain, model)]
    apply_mra_kernels(model)
    for _ in range(3):
        for m, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            m(pixels()).square().mean().backward()
            optimizer.step()
    assert_near(list(model.state_dict().values()), list(plain.state_dict().values()))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    plain.load_state_dict(torch.load(tmp_path / "weights.pt"), strict=True)
    assert_near([model(pixels())], [plain(pixels())])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_copies_compute_with_weights_of_their_own(duplicate: Callable, calls: list[str]) -> None:
    model = make()
    expected = model(pixels())
    apply_mra_kernels(model)
    other = duplicate(model)
    assert_near([other(pixels())], [expected])
    assert calls.count("linear_gelu") == 5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_near([other(pixels())], [expected])
    assert not model(pixels()).equal(expected)
    apply_mra_kernels(other).undo()
    assert other(pixels()).equal(expected)


def test_a_replica_of_data_parallel_computes_with_its_own_weights() -> None:
    block = randomize(ConvNeXt()).stages[1].blocks[0]  # type: ignore[union-attr, index]
    x = pixels(2, 12, 8, 8)
    apply_mra_kernels(block)
    replica = block._replicate_for_data_parallel()
    replica._modules["conv_dw"] = nn.Conv2d(12, 12, 7, padding=3, groups=12)
    expected = copy.deepcopy(block)
    expected.conv_dw = replica._modules["conv_dw"]
    replica.gamma = block.gamma.detach()
    assert_near([replica(x)], [expected(x)])
    assert relative_error(replica(x), block(x)) > 0.01


def test_twice_is_once() -> None:
    model = make()
    first = apply_mra_kernels(model)
    classes = [type(m) for m in model.modules()]
    second = apply_mra_kernels(model)
    assert str(second) == str(first)
    assert [type(m) for m in model.modules()] == classes
    expected = make()(pixels())
    second.undo()
    assert model(pixels()).equal(expected)
    first.undo()
    with pytest.raises(ValueError, match="patched with backend=None and ops="):
        apply_mra_kernels(model) and apply_mra_kernels(model, backend="reference")


@pytest.mark.parametrize("prob", [0.0, 0.4])
def test_dropped_paths(prob: float, calls: list[str]) -> None:
    """In training the same ones as without the kernels; the last sum is PyTorch's then."""
    model = randomize(ConvNeXt(drop_path=prob)).train()
    torch.manual_seed(5)
    expected = run(model, pixels(8, 3, 32, 32))
    apply_mra_kernels(model)
    torch.manual_seed(5)
    assert_near(run(model, pixels(8, 3, 32, 32)), expected)
    assert calls.count("linear_gelu") == 5
    assert calls.count("linear_scale_residual") == (0 if prob else 5)
    model.eval()(pixels())
    assert calls.count("linear_scale_residual") == (5 if prob else 10)


def test_dropped_paths_of_transformers() -> None:
    model = randomize(ConvNextModel(ConvNextConfig(**SIZES, drop_path_rate=0.5))).train()
    torch.manual_seed(5)
    expected = run(model, pixels())
    apply_mra_kernels(model)
    torch.manual_seed(5)
    assert_near(run(model, pixels()), expected)


@pytest.mark.parametrize("name", ["timm's twin", "ConvNextModel", "DINOv3ConvNextModel"])
def test_autocast(name: str, calls: list[str]) -> None:
    """Dtypes are those without the kernels, sums between blocks in float32 among them."""
    model = make(name)
    exact = run(model, pixels())
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model, pixels())
        apply_mra_kernels(model)
        actual = run(model, pixels())
    assert calls.count("depthwise_conv_norm") == calls.count("linear_gelu") == 5
    assert calls.count("norm_patchify") == 3
    assert calls.count("linear_scale_residual") == calls.count("patch_conv_norm") == 0
    for a, e, x in zip(actual, expected, exact, strict=True):
        assert a.dtype == e.dtype
        assert relative_error(a, x) <= 2 * relative_error(e, x) + 0.005


@pytest.mark.parametrize("name", ["timm's twin", "ConvNextModel", "DINOv3ConvNextModel"])
def test_compile(name: str) -> None:
    torch._dynamo.reset()
    model = make(name)
    expected = run(model, pixels())
    apply_mra_kernels(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_near(run(compiled, pixels()), expected)  # type: ignore[arg-type]


def test_export() -> None:
    model = make()
    apply_mra_kernels(model)
    program = torch.export.export(model, (pixels(),))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "mra.depthwise_conv_norm.default" in targets
    assert_near([program.module()(pixels())], [model(pixels())])


def test_func_transforms(calls: list[str]) -> None:
    """Gradients of each picture by torch.func, which the ops do not take: the modules' own forwards do."""
    model = make()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    per_picture = torch.func.vmap(torch.func.grad(loss), (None, 0))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    expected = per_picture(parameters, pixels())
    apply_mra_kernels(model)
    actual = per_picture(parameters, pixels())
    assert calls == []
    assert_near(list(actual.values()), list(expected.values()))


def test_fx_sees_the_modules_own_forwards() -> None:
    model = make()
    expected = model(pixels())
    apply_mra_kernels(model)
    graph = torch.fx.symbolic_trace(model)
    assert "stages.1.blocks.0.conv_dw" in {node.target for node in graph.graph.nodes}
    assert_near([graph(pixels())], [expected])


def test_in_place_changes_of_results() -> None:
    model = make()
    expected = run(nn.Sequential(model, nn.ReLU()), pixels())
    apply_mra_kernels(model)
    assert_near(run(nn.Sequential(model, nn.ReLU(inplace=True)), pixels()), expected)


def test_recomputed_in_backward() -> None:
    model = make()
    expected = run(model, pixels())
    apply_mra_kernels(model)
    stages, stem = model.stages, model.stem
    model.forward = lambda x: checkpoint(stages, stem(x), use_reentrant=False)  # type: ignore[method-assign, assignment]
    assert_near(run(model, pixels()), expected)


@pytest.mark.parametrize("op", BLOCK)
def test_one_op_only(op: str, calls: list[str]) -> None:
    model = make()
    expected = run(model, pixels())
    report = apply_mra_kernels(model, ops={op})
    assert report.counts == {"block": 5}
    assert report.left["stem"] == {"patch_conv_norm": "not among ops"}
    assert_near(run(model, pixels()), expected)
    assert calls == [op] * 5


def test_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    apply_mra_kernels(model, backend="reference")
    seen = []
    op = OPS["linear_gelu"]
    monkeypatch.setattr(op, "reference", lambda *a, r=op.reference: (seen.append(1), r(*a))[1])
    model(pixels())
    assert len(seen) == 5
    assert mra_kernels.dispatch.preference() is None


def test_refusals() -> None:
    with pytest.raises(TypeError, match="model is a dict, but must be"):
        apply_mra_kernels({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'cuda' is no backend"):
        apply_mra_kernels(make(), backend="cuda")
    with pytest.raises(ValueError, match=r"ops has 'conv', which no module uses; choose from adapter_gate, "):
        apply_mra_kernels(make(), ops=["conv"])
    report = apply_mra_kernels(nn.Linear(2, 2))
    assert str(report).startswith("nothing recognised: Linear has no ConvNeXt")
    report.undo()
    assert not apply_mra_kernels(mra_kernels.modules.ConvNeXt((8, 12), (1, 1))).left  # type: ignore[attr-defined]


def test_report() -> None:
    model = randomize(ConvNeXt())
    model.stages[1].blocks[0].mlp.act = nn.SiLU()  # type: ignore[union-attr, index]
    assert str(apply_mra_kernels(model)).splitlines() == [
        "replaced   1 x stem: patch_conv_norm",
        "replaced   4 x block: depthwise_conv_norm, linear_gelu, linear_scale_residual",
        "replaced   3 x downsample: norm_patchify",
        "replaced   1 x block: depthwise_conv_norm, linear_scale_residual",
        "left alone stages.1.blocks.0: linear_gelu: mlp.act is a SiLU, not GELU",
    ]
