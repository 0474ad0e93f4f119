"""The modules against the authors' results, fused against the reference, and under compilers and exporters."""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from op_calls import CHOICES, devices, require, threads
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mra_kernels
from mra_kernels.modules import ConvNeXt, ConvNeXtBlock, Merge, MRAdapter, Stem, resample_mean_weights
from mra_kernels.reference.gated_resample_add import resample
from mra_kernels.testing import relative_error

DATA = Path(__file__).parent / "data"
ADAPTER_FILES = ("mr_adapter_identity", "mr_adapter_downsample", "mr_adapter_upsample")
MERGE_FILES = ("align_identity", "align_downsample", "align_upsample")
CONVNEXT_FILES = ("convnext_large", "convnext_xxlarge")

# The authors' names, in the order in which they are replaced.
RENAMES = {
    "adapter": (
        ("fast_", "low_"),
        ("slow_", "high_"),
        (r"gate\.0", "gate_up"),
        (r"gate\.2", "gate_down"),
        (r"\.", "_"),
    ),
    "merge": ((r"fast_proj\.", "low_"), (r"slow_proj\.", "high_")),
    "convnext": (
        (r"stem\.0\.", "stem."),
        (r"stem\.1\.", "stem.norm_"),
        (r"downsample\.0\.", "downsample.norm_"),
        (r"downsample\.1\.", "downsample."),
        (r"conv_dw\.", "conv_"),
        (r"(blocks\.\d+)\.norm\.", r"\1.norm_"),
        (r"mlp\.fc1\.", "up_"),
        (r"mlp\.fc2\.", "down_"),
        (r"(blocks\.\d+)\.weight", r"\1.layer_scale"),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random: norms around 1, the rest so that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        fan_in = max(1, parameter[0].numel())
        with torch.no_grad():
            if name.endswith("norm_weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise / fan_in**0.5 if parameter.dim() > 1 else 0.3 * noise)
    return module


def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def build(name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[nn.Module, str]:
    """The module that a golden file is about, and which renames it needs."""
    if name in CONVNEXT_FILES:
        channels, depths = ([int(n) for n in re.findall(r"\d+", metadata[key])] for key in ("dims", "depths"))
        return ConvNeXt(channels, depths, eps=float(metadata["norm_eps"])), "convnext"
    low, high = tensors["input.0"].shape[-1], tensors["input.1"].shape[1]
    return (MRAdapter(low, high), "adapter") if name in ADAPTER_FILES else (Merge(low, high), "merge")


def as_parameters(tensors: dict[str, Tensor], prefix: str, module: nn.Module, kind: str) -> dict[str, Tensor]:
    """The authors' tensors under this package's names and in its layouts."""
    shapes = {n: p.shape for n, p in module.named_parameters()}
    renamed = {}
    for key, value in tensors.items():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        for pattern, replacement in RENAMES[kind]:
            name = re.sub(pattern, replacement, name)
        if "downsample" in name and value.dim() == 4:
            value = value.permute(0, 2, 3, 1)
        renamed[name] = value.reshape(shapes[name])
    return renamed


def as_map(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Tokens [B, L, C] or a map [B, C, H, W] -> [B, H, W, C]. Square, as the golden tokens are."""
    if x.dim() == 4:
        return x.permute(0, 2, 3, 1)
    side = int(x.shape[1] ** 0.5)
    return x.unflatten(1, (side, side))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", CHOICES)
@pytest.mark.parametrize("name", [*ADAPTER_FILES, *MERGE_FILES, *CONVNEXT_FILES])
def test_golden(name: str, backend: str, dtype: torch.dtype, device: str) -> None:
    """Outputs and all gradients of the authors' code; float64 shows that what is left in float32 is rounding."""
    require(backend, device, dtype)
    tensors, metadata = read(name)
    module, kind = build(name, tensors, metadata)
    module.load_state_dict(as_parameters(tensors, "param.", module, kind), strict=True)
    module.to(device, dtype)
    # The trunk takes pixels as they are; everything else is a map.
    layout: Callable[[Tensor], Tensor] = (lambda x: x) if kind == "convnext" else as_map
    keys = sorted(k for k in tensors if k.startswith("input."))
    inputs = [layout(tensors[k]).to(device, dtype).requires_grad_() for k in keys]
    names, parameters = zip(*module.named_parameters(), strict=True)
    with mra_kernels.use_backend(backend):
        output = module(*inputs)
        gradient = as_map(tensors["grad_output"]).to(device, dtype)
        gradients = torch.autograd.grad(output, [*inputs, *parameters], gradient)

    expected = {"output": as_map(tensors["output"])} | {k: layout(tensors[f"grad_{k}"]) for k in keys}
    expected |= as_parameters(tensors, "grad_param.", module, kind)
    actual = dict(zip(["output", *keys, *names], [output, *gradients], strict=True))
    assert actual.keys() == expected.keys()
    limit = 1e-4 if dtype == torch.float32 else 1e-6
    errors = {name: relative_error(value.cpu(), expected[name]) for name, value in actual.items()}
    assert {name: error for name, error in errors.items() if not error < limit} == {}


def run(module: Callable, inputs: list[Tensor], seed: int = 9) -> list[Tensor]:
    """The output, and all gradients for a random gradient of it."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = module(*leaves)
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    # A compiled module is a module, too, to everyone but mypy.
    parameters = module.parameters()  # type: ignore[attr-defined]
    return [output, *torch.autograd.grad(output, [*leaves, *parameters], gradient)]


def maps(low: tuple[int, int], high: tuple[int, int], dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((batch, *low, 12), (batch, *high, 10))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


GRIDS = [
    ((6, 8), (6, 8)),
    ((5, 7), (5, 7)),
    ((3, 4), (6, 12)),
    ((3, 4), (3, 8)),
    ((7, 9), (4, 5)),
    ((7, 9), (1, 1)),
    ((7, 9), (7, 2)),
    ((8, 6), (2, 6)),
    ((1, 5), (1, 3)),
    ((1, 1), (1, 1)),
    ((1, 1), (4, 3)),
]


@pytest.mark.parametrize("module_class", [MRAdapter, Merge])
@pytest.mark.parametrize(("low", "high"), GRIDS)
def test_algebra_equals_the_paper(module_class: Callable, low: tuple[int, int], high: tuple[int, int]) -> None:
    """Means before projections, pooling first, projections merged: in float64 the same to the last digits."""
    module = randomize(module_class(12, 10)).double()
    inputs = maps(low, high, torch.float64)
    actual = run(module, inputs)
    with mra_kernels.use_backend("reference"):
        expected = run(module, inputs)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-12


@pytest.mark.parametrize("module_class", [MRAdapter, Merge])
@pytest.mark.parametrize(("low", "high"), GRIDS[::2])
def test_bfloat16_is_no_worse_than_the_paper(
    module_class: Callable, low: tuple[int, int], high: tuple[int, int]
) -> None:
    module = randomize(module_class(12, 10)).bfloat16()
    inputs = maps(low, high, torch.bfloat16)
    exact_module = copy.deepcopy(module).double()
    with mra_kernels.use_backend("reference"):
        exact = run(exact_module, [x.double() for x in inputs])
        baseline = run(module, inputs)
    for a, e, b in zip(run(module, inputs), exact, baseline, strict=True):
        assert relative_error(a, e) <= 2 * relative_error(b, e) + 0.01


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("module_class", [MRAdapter, Merge])
@pytest.mark.parametrize("high", [(7, 8), (6, 2), (4, 4)])
def test_grids_that_do_not_divide_are_refused(module_class: Callable, high: tuple[int, int], backend: str) -> None:
    """Pooling would drop rows without a word, and the gate would still count them."""
    module = randomize(module_class(12, 10))
    with mra_kernels.use_backend(backend), pytest.raises(ValueError, match="cannot be pooled to"):
        module(*maps((3, 4), high, torch.float32))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("low", "high"), GRIDS[:5])
def test_a_new_adapter_is_the_identity(low: tuple[int, int], high: tuple[int, int], backend: str) -> None:
    """Training starts from the plain ViT, bitwise."""
    inputs = maps(low, high, torch.float32)
    with mra_kernels.use_backend(backend):
        assert torch.equal(MRAdapter(12, 10)(*inputs), inputs[0])


@pytest.mark.parametrize(("source", "target"), [((4, 6), (7, 9)), ((1, 5), (3, 5)), ((6, 4), (3, 2)), ((3, 3), (3, 3))])
def test_mean_weights_give_the_mean_of_the_resampled_map(source: tuple[int, int], target: tuple[int, int]) -> None:
    x = torch.randn(1, *source, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = resample_mean_weights(source, target, x.new_empty(0))
    torch.testing.assert_close((x.flatten(1, 2) * weights[:, None]).sum(1), resample(x, *target).mean((1, 2)))


def random(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def tiny_trunk() -> ConvNeXt:
    trunk = ConvNeXt((8, 12, 16, 20), (1, 2, 1, 1))
    return randomize(trunk)  # type: ignore[return-value]


@pytest.mark.parametrize(("batch", "height", "width"), [(0, 64, 64), (1, 33, 70), (2, 96, 64)])
def test_trunk_sizes(batch: int, height: int, width: int) -> None:
    """No picture at all, and sides that are no multiple of 32: the last rows are dropped, as convolutions drop them."""
    trunk = tiny_trunk()
    (pixels,) = random([(batch, 3, height, width)])
    output, *gradients = run(trunk, [pixels])
    assert output.shape == (batch, height // 32, width // 32, 20)
    assert all(g.isfinite().all() for g in gradients)
    with mra_kernels.use_backend("reference"):
        expected = run(trunk, [pixels])
    for a, e in zip([output, *gradients], expected, strict=True):
        assert relative_error(a, e) < 1e-5


def test_default_layer_scale_and_norms() -> None:
    trunk = ConvNeXt((8, 12), (1, 1), layer_scale_init=1e-6)
    parameters = dict(trunk.named_parameters())
    assert (parameters["stages.1.blocks.0.layer_scale"] == 1e-6).all()
    assert (parameters["stages.1.blocks.0.norm_weight"] == 1).all()
    assert parameters["stages.1.blocks.0.up_weight"].std() > 0.01


def test_block_can_be_checkpointed() -> None:
    block = randomize(ConvNeXtBlock(12))
    x = random([(2, 5, 6, 12)])[0].requires_grad_()
    plain = torch.autograd.grad(block(x).sum(), [x, *block.parameters()])
    again = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), [x, *block.parameters()])
    for a, e in zip(again, plain, strict=True):
        torch.testing.assert_close(a, e)


def test_autocast_matches_a_cast_module() -> None:
    adapter = randomize(MRAdapter(12, 10))
    inputs = maps((7, 9), (4, 5), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, *gradients = run(adapter, inputs)
    expected = run(adapter, inputs)
    assert output.dtype == torch.bfloat16
    assert {g.dtype for g in gradients} == {torch.float32}
    for a, e in zip([output, *gradients], expected, strict=True):
        assert relative_error(a, e) < 0.05


def test_modules_hold_bare_parameters() -> None:
    """Tools that replace nn.Linear, nn.Conv2d or nn.LayerNorm find none."""
    for module in (Stem(3, 8), ConvNeXtBlock(8), MRAdapter(12, 10), Merge(12, 10)):
        assert list(module.children()) == []
    with torch.device("meta"):
        assert all(p.is_meta for p in tiny_trunk().parameters())


CASES: list[tuple[Callable[[], nn.Module], list[tuple[int, ...]], list[tuple[int, ...]]]] = [
    (lambda: randomize(MRAdapter(12, 10)), [(2, 7, 9, 12), (2, 4, 5, 10)], [(3, 11, 13, 12), (3, 5, 6, 10)]),
    (lambda: randomize(MRAdapter(12, 10)), [(2, 6, 5, 12), (2, 6, 5, 10)], [(3, 9, 7, 12), (3, 9, 7, 10)]),
    (lambda: randomize(Merge(12, 10)), [(2, 7, 9, 12), (2, 4, 5, 10)], [(3, 11, 13, 12), (3, 5, 6, 10)]),
    (lambda: randomize(ConvNeXt((8, 12), (1, 1))), [(2, 3, 48, 64)], [(4, 3, 32, 80)]),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("make", "first", "second"), CASES, ids=["resize", "same-grid", "merge", "trunk"])
def test_compile(make: Callable, first: list, second: list, backend: str) -> None:
    """One graph for several sizes, trained: outputs and gradients are those of eager execution."""
    torch._dynamo.reset()
    module = make()
    with mra_kernels.use_backend(backend):
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        for shapes in (first, second):
            inputs = random(shapes)
            for a, e in zip(run(compiled, inputs), run(module, inputs), strict=True):
                assert relative_error(a, e) < 1e-4


@pytest.mark.parametrize(("make", "first", "second"), [CASES[0], CASES[3]], ids=["resize", "trunk"])
def test_compile_with_inductor(make: Callable, first: list, second: list) -> None:
    """The default compiler with dynamic sizes, for inference; trained, its sizes are fixed (see `OpSuite`)."""
    torch._dynamo.reset()
    module = make()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for shapes in (first, second):
        inputs = random(shapes)
        with torch.no_grad():
            assert relative_error(compiled(*inputs), module(*inputs)) < 1e-5


@pytest.mark.parametrize(("make", "first", "second"), CASES, ids=["resize", "same-grid", "merge", "trunk"])
def test_export(make: Callable, first: list, second: list) -> None:
    """Exported with a dynamic batch, run at another batch size."""
    module = make().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    inputs = tuple(random(first))
    program = torch.export.export(module, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    other = random([(second[0][0], *s[1:]) for s in first])
    assert relative_error(program.module()(*other), module(*other)) < 1e-5
