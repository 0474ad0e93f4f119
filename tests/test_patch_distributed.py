"""`apply_mra_kernels` inside DDP and FSDP, in one process."""

from collections.abc import Callable, Iterator

import pytest
import torch
from models_of_others import ConvNeXt, randomize
from op_calls import threads
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mra_kernels import apply_mra_kernels
from mra_kernels.ops import OPS
from mra_kernels.testing import relative_error


@pytest.fixture(scope="module", autouse=True)
def mesh() -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    with threads(1):
        yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def shard_all(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(model, mesh=mesh)


def shard_blocks(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for module in [m for m in model.modules() if type(m).__name__ == "ConvNeXtBlock"]:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_children(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module) -> list[Tensor]:
    output = model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    output.square().sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    return [output, *(getattr(grad, "_local_tensor", grad) for grad in grads)]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("wrap", "fused"),
    [
        (lambda model, mesh: DistributedDataParallel(model), 5),
        (shard_all, 5),
        (shard_blocks, 5),
        # Their hooks gather the weights, so they must be called.
        (shard_children, 0),
    ],
    ids=["DDP", "all", "blocks", "children"],
)
def test_patched_first(wrap: Callable, fused: int, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(randomize(ConvNeXt()))
    calls: list[int] = []
    op = OPS["linear_gelu"]
    serve = op._serve
    monkeypatch.setattr(op, "_serve", lambda args: (calls.append(1), serve(args))[1])
    model = randomize(ConvNeXt())
    apply_mra_kernels(model)
    for a, e in zip(train(wrap(model, mesh)), expected, strict=True):
        assert relative_error(a, e) < 1e-4
    assert len(calls) == fused


def test_sharded_first_is_left_alone(mesh: DeviceMesh) -> None:
    model = fully_shard(randomize(ConvNeXt()), mesh=mesh)
    report = apply_mra_kernels(model)
    assert not report.replaced
    assert report.left["stem"] == {"patch_conv_norm": "[0] holds a DTensor"}
    assert len(report.left) == 9


def test_undo_of_sharded_blocks_says_what_to_do(mesh: DeviceMesh) -> None:
    model = randomize(ConvNeXt())
    report = apply_mra_kernels(model)
    shard_blocks(model, mesh)
    with pytest.raises(RuntimeError, match="5 modules became FSDPConvNeXtBlock since they were patched"):
        report.undo()
