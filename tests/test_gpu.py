"""What only a GPU can show: real shapes, repeats, streams, graphs, other devices, many elements, golden parity there.

Every op's own test file runs its cases on a GPU too, marked likewise: `pytest tests -m gpu` is all of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from checkpoints import DATA, arch_of
from golden_model import PROMPT_LENGTH, Golden, golden_pixels
from op_calls import KERNELS, Route, Solution, call, check, differentiable, make_grad_outputs, solve
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import mra_kernels
from bench.shapes import LARGE
from bench.suites.kernel_cases import cases
from mra_kernels.dispatch import why_not
from mra_kernels.modules import ConvNeXt, Merge, MRAdapter
from mra_kernels.native import _extension
from mra_kernels.ops import OPS
from mra_kernels.reference.gated_resample_add import resample
from mra_kernels.testing import assert_close, make_inputs, relative_error
from mra_model.convert import convert, keys

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GOLDEN_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Call:
    """One op at one of the tower's shapes by one backend."""

    op: str
    label: str
    dims: tuple
    route: Route

    def __str__(self) -> str:
        return f"{self.op}-{self.label}-{self.route}".replace(" ", "_")

    def inputs(self, seed: int = 1, device: torch.device = DEVICE) -> dict[str, Any]:
        return make_inputs(self.op, *self.dims, dtype=self.route.dtype, device=device, seed=seed)

    def solve(self, inputs: dict[str, Any], grad_outputs: tuple[Tensor, ...]) -> Solution:
        wanted = differentiable(self.op, inputs)
        return solve(partial(call, self.op, self.route.backend), inputs, grad_outputs, wanted)


def calls(
    backends: tuple[str, ...], dtypes: tuple[torch.dtype, ...], shapes: int | None = None, batch: int = 2
) -> list[Any]:
    """Every op's first `shapes` shapes, for `batch` pictures of 1024 x 1024, by every backend that serves it."""
    found = [
        Call(op, f"{case.model} {case.shape}", case.sizes(batch), Route("cuda", backend, dtype))
        for op, operator in OPS.items()
        for case in cases(op, [LARGE])[:shapes]
        for backend in backends
        for dtype in dtypes
        if why_not(operator.backends, backend, DEVICE, dtype) is None
    ]
    nothing = pytest.param(None, marks=pytest.mark.skip(reason=f"no op has a kernel of {backends} for a GPU here"))
    return [pytest.param(each, id=str(each)) for each in found] or [nothing]


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """TF32 would make PyTorch's own float32 results a thousand times worse; memory goes back for the next test."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch.cuda.empty_cache()


def assert_same(actual: Solution, expected: Solution, bitwise: bool) -> None:
    pairs = [*zip(actual.outputs, expected.outputs, strict=True)]
    pairs += [(grad, expected.grads[name]) for name, grad in actual.grads.items()]
    for a, e in pairs:
        assert torch.equal(a, e) if bitwise else relative_error(a, e) < 1e-2


def test_the_extension_has_cuda_kernels() -> None:
    assert _extension.PROBLEM is None
    assert _extension.HAS_CUDA


class TestOps:
    @pytest.mark.parametrize("case", calls(("reference", *KERNELS), (torch.bfloat16,), batch=1))
    def test_real_shapes(self, case: Call) -> None:
        inputs = case.inputs()
        check(case.op, case.route, inputs, make_grad_outputs(case.op, inputs))

    @pytest.mark.parametrize("case", calls(KERNELS, DTYPES))
    def test_250_repeats_are_bitwise_equal(self, case: Call) -> None:
        inputs = case.inputs()
        grad_outputs = make_grad_outputs(case.op, inputs)
        first = case.solve(inputs, grad_outputs)
        for _ in range(250):
            assert_same(case.solve(inputs, grad_outputs), first, bitwise=True)

    @pytest.mark.parametrize("case", calls(("reference", *KERNELS), (torch.bfloat16,), shapes=1))
    def test_second_stream(self, case: Call) -> None:
        """Inputs arrive late on the stream: work that does not wait for them there computes with NaN."""
        inputs = case.inputs()
        grad_outputs = make_grad_outputs(case.op, inputs)
        expected = case.solve(inputs, grad_outputs)
        late = {n: torch.full_like(v, float("nan")) if isinstance(v, Tensor) else v for n, v in inputs.items()}
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            _copy(late, inputs)
            actual = case.solve(late, grad_outputs)
        stream.synchronize()
        assert_same(actual, expected, case.route.is_kernel)

    @pytest.mark.parametrize("case", calls(("reference", *KERNELS), (torch.bfloat16,), shapes=1))
    def test_cuda_graph(self, case: Call) -> None:
        """Forward and backward, captured once and replayed on other values."""
        static, other = case.inputs(), case.inputs(seed=2)
        grad_outputs = make_grad_outputs(case.op, static)
        expected = case.solve(other, grad_outputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            case.solve(static, grad_outputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = case.solve(static, grad_outputs)
        _copy(static, other)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, expected, case.route.is_kernel)

    @pytest.mark.parametrize("case", calls(KERNELS, (torch.bfloat16,), shapes=1))
    def test_device_that_is_not_current(self, case: Call) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("there is one CUDA device")
        other = torch.device("cuda", 1)
        inputs = case.inputs(device=other)
        grad_outputs = make_grad_outputs(case.op, inputs)
        with torch.cuda.device(0):
            actual = case.solve(inputs, grad_outputs)
        assert {grad.device for grad in actual.grads.values()} == {other}
        check(case.op, case.route, inputs, grad_outputs)


def _copy(target: dict[str, Any], source: dict[str, Any]) -> None:
    for name, value in source.items():
        if isinstance(value, Tensor):
            target[name].copy_(value)


class TestManyElements:
    """Maps of more than 2^31 elements: what lies at their end, where a 32-bit index would have wrapped around."""

    memory = 32 << 30
    tail = slice(-8, None)

    @pytest.mark.parametrize(
        ("low_shape", "high_shape"),
        [
            ((2, 1025, 1024, 1024), (2, 1025, 1024, 1024)),
            ((2, 1025, 1024, 1024), (2, 512, 512, 1024)),
            ((2, 512, 1024, 1024), (2, 1024, 2048, 1024)),
        ],
        ids=["same_grid", "bilinear", "pooled"],
    )
    @pytest.mark.parametrize("backend", KERNELS)
    def test_gated_resample_add(self, backend: str, low_shape: tuple, high_shape: tuple) -> None:
        reason = why_not(OPS["gated_resample_add"].backends, backend, DEVICE, torch.bfloat16)
        if reason is not None:
            pytest.skip(reason)
        if torch.cuda.mem_get_info()[0] < self.memory:
            pytest.skip(f"less than {self.memory >> 30} GiB are free on the GPU")
        low, high, grad = (self.random(*shape) for shape in (low_shape, high_shape, low_shape))
        gate = torch.tensor([0.3, -0.7], device=DEVICE)
        high.requires_grad_()
        gate.requires_grad_()
        with mra_kernels.use_backend(backend):
            y = mra_kernels.gated_resample_add(low, high, gate)
        grad_high, grad_gate = torch.autograd.grad(y, (high, gate), grad)
        end = [x.detach()[-1:, ..., self.tail] for x in (low, high, grad)]
        exact = self.solve(*(x.double() for x in end), gate)
        own = self.solve(*end, gate)
        for actual, e, o in zip((y, grad_high), exact, own, strict=True):
            assert_close(actual[-1:, ..., self.tail], e, torch.bfloat16, baseline=o, gradient=True)
        # A sum of a thousand million random products is about the root of their number, and so is a wrong one.
        expected = self.gate_gradient(high.detach()[-1:], grad[-1:])
        assert abs(grad_gate[-1].item() - expected) < 1e-3 * grad[-1].numel() ** 0.5

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

    def solve(self, low: Tensor, high: Tensor, grad: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """The reference on a slice of the last picture's channels, which do not mix: y and the gradient of high."""
        high = high.requires_grad_()
        last = gate.detach()[-1:].to(torch.promote_types(high.dtype, torch.float32))
        with mra_kernels.use_backend("reference"):
            y = mra_kernels.gated_resample_add(low, high, last)
        return y, torch.autograd.grad(y, high, grad)[0]

    def gate_gradient(self, high: Tensor, grad: Tensor) -> float:
        """In float64, in slices of the channels."""
        parts = zip(high.split(64, -1), grad.split(64, -1), strict=True)
        return sum((g.double() * resample(h.double(), *g.shape[1:3])).sum().item() for h, g in parts)


def golden_module(
    name: str, authors: str, ours: str, module: nn.Module
) -> tuple[nn.Module, dict[str, Tensor], Callable]:
    """A module with golden parameters on the GPU, the file's tensors, and its expected gradient by parameter name."""
    tensors = {key: value.to(DEVICE) for key, value in load_file(DATA / f"{name}.safetensors").items()}
    renamed = {}
    for key in tensors:
        if key.startswith("param."):
            found = keys.to_ours(authors + key.removeprefix("param."))
            assert found is not None, key
            renamed[found.key.removeprefix(ours)] = (found.layout, key.removeprefix("param."))
    module = module.to(DEVICE)
    module.load_state_dict({n: layout(tensors[f"param.{key}"]) for n, (layout, key) in renamed.items()})
    return module, tensors, lambda n: renamed[n][0](tensors[f"grad_param.{renamed[n][1]}"])


def assert_golden(module: nn.Module, inputs: list[Tensor], output: Tensor, tensors: dict, gradient: Callable) -> None:
    """Output, gradients of inputs (as the file has them, [B, C, H, W] for maps) and of all parameters."""
    assert relative_error(output, tensors["output"]) < GOLDEN_TOLERANCE
    output.backward(tensors["grad_output"])
    for index, x in enumerate(inputs):
        assert relative_error(x.grad, tensors[f"grad_input.{index}"]) < GOLDEN_TOLERANCE
    for name, parameter in module.named_parameters():
        assert relative_error(parameter.grad, gradient(name)) < GOLDEN_TOLERANCE, name


@pytest.mark.parametrize("backend", ["reference", "auto"])
class TestGolden:
    @pytest.mark.parametrize("mode", ["identity", "downsample", "upsample"])
    @pytest.mark.parametrize(
        ("file", "authors", "ours", "make"),
        [
            ("mr_adapter", keys.ADAPTERS + "0.", keys.TOWER + "adapters.0.", MRAdapter),
            ("align", keys.MERGE + "0.", keys.TOWER + "merge.", Merge),
        ],
        ids=["adapter", "merge"],
    )
    def test_two_maps(self, file: str, authors: str, ours: str, make: type, mode: str, backend: str) -> None:
        module, tensors, gradient = golden_module(f"{file}_{mode}", authors, ours, make(48, 80))
        inputs = [tensors[f"input.{i}"].requires_grad_() for i in range(2)]
        with mra_kernels.use_backend(backend):
            output = module(inputs[0].unflatten(1, (8, 8)), inputs[1].permute(0, 2, 3, 1)).flatten(1, 2)
        assert_golden(module, inputs, output, tensors, gradient)

    @pytest.mark.parametrize(("size", "eps"), [("large", 1e-6), ("xxlarge", 1e-5)])
    def test_convnext(self, size: str, eps: float, backend: str) -> None:
        trunk = ConvNeXt((16, 24, 32, 40), (1, 2, 1, 1), eps)
        module, tensors, gradient = golden_module(f"convnext_{size}", keys.HIGH, keys.TOWER + "high.", trunk)
        pixels = tensors["input.0"].requires_grad_()
        with mra_kernels.use_backend(backend):
            output = module(pixels).permute(0, 3, 1, 2)
        assert_golden(module, [pixels], output, tensors, gradient)

    @torch.no_grad()
    def test_checkpoint(self, backend: str, tmp_path: Any) -> None:
        """Features, projected features, logits and greedy tokens of the authors' model, converted."""
        name = "llava_hr_tiny_384"
        convert(DATA / name, tmp_path / name, arch=arch_of(name))
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / name).to(DEVICE).eval()
        config, golden = model.config, Golden(name)
        pixels = golden_pixels(config.vision_config.image_size).to(DEVICE)
        ids = golden.expand("input_ids", config.image_token_index, config.image_seq_length).to(DEVICE)
        mask = golden.expand("attention_mask", 1, config.image_seq_length).to(DEVICE)
        expected = {key: value.to(DEVICE) for key, value in golden.expected.items()}
        with mra_kernels.use_backend(backend):
            features = model.model.vision_tower(pixels).last_hidden_state
            projected = model.model.multi_modal_projector(features)
            logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
            prompt = ids[:1, : PROMPT_LENGTH - 1 + config.image_seq_length]
            # Golden decoding goes on after an end of sequence.
            model.generation_config.eos_token_id = None
            count = len(expected["generated"])
            options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": count, "do_sample": False}
            generated = model.generate(input_ids=prompt, pixel_values=pixels[:1], **options)
        vocabulary = expected["logits"].shape[-1]
        assert relative_error(features, expected["vision_features"]) < GOLDEN_TOLERANCE
        assert relative_error(projected, expected["projected"]) < GOLDEN_TOLERANCE
        at = expected["logit_positions"]
        assert relative_error(logits[:, at, :vocabulary], expected["logits"]) < GOLDEN_TOLERANCE
        assert generated[0, prompt.shape[1] :].tolist() == expected["generated"].tolist()
