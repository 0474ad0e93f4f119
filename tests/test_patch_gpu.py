"""`apply_mra_kernels` on a GPU: a model of transformers, and one of timm where it is installed."""

from collections.abc import Iterator

import pytest
import torch
from models_of_others import randomize
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextModel

from mra_kernels import apply_mra_kernels
from mra_kernels.testing import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """TF32 would make PyTorch's own float32 results a thousand times worse."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def make(name: str) -> nn.Module:
    """Widths on which kernels run with and without 16-byte accesses, every parameter random."""
    if name == "timm":
        timm = pytest.importorskip("timm")
        model = timm.create_model("convnext_tiny", dims=(64, 96, 100, 192), depths=(1, 2, 1, 1), num_classes=7)
    else:
        model = ConvNextModel(ConvNextConfig(hidden_sizes=[64, 96, 100, 192], depths=[1, 2, 1, 1]))
    return randomize(model).eval()


def run(model: nn.Module) -> list[Tensor]:
    """The result, and the gradients of the picture and of every parameter, on the CPU in float64."""
    device, dtype = next((p.device, p.dtype) for p in model.parameters())
    x = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()
    output = model(x)
    output = output if isinstance(output, Tensor) else output.last_hidden_state
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    grads = torch.autograd.grad(output, [x, *model.parameters()], grad, allow_unused=True)
    return [t.double().cpu() for t in (output, *grads) if t is not None]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["transformers", "timm"])
def test_results_and_gradients(name: str, dtype: torch.dtype) -> None:
    model = make(name)
    exact = run(model.double())
    model = model.to("cuda", dtype)
    plain = run(model)
    report = apply_mra_kernels(model)
    assert report.counts == {"stem": 1, "block": 5, "downsample": 3}
    for number, (actual, expected) in enumerate(zip(run(model), exact, strict=True)):
        assert relative_error(actual, expected) < TOLERANCES[dtype], number
    report.undo()
    assert torch.equal(run(model)[0], plain[0])
