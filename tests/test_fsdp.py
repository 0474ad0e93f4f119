"""The model under FSDP2, in two processes on a CPU: loss and gradients are those of one process."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import make_tiny_config
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mra_model import build_model

# What may be sharded by itself, beside what the model names: modules of the tower whose `forward` is called.
BLOCKS = {"MraConvNeXtBlock", "MraAdapterLayer", "MraEncoderLayer"}


def shard_named(model: nn.Module, more: set[str] = frozenset()) -> None:
    """As accelerate does it: each module of a class that the model names, then the rest."""
    # On a machine with GPUs the default is one of them.
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for names in (more, model._no_split_modules):
        for module in model.modules():
            if type(module).__name__ in names:
                fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_blocks(model: nn.Module) -> None:
    shard_named(model, BLOCKS)


def shard_checkpointed(model: nn.Module) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    shard_blocks(model)


def make_batch(model: nn.Module) -> dict[str, torch.Tensor]:
    """Two prompts about a picture each, different ones; the loss is over the words behind it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 640, (2, 24), generator=generator)
    tokens[:, 2:18] = model.config.image_token_index
    labels = tokens.clone()
    labels[:, :18] = -100
    return {"input_ids": tokens, "labels": labels, "pixel_values": torch.randn(2, 3, 128, 128, generator=generator)}


def compare(rank: int, store: str) -> None:
    """What each process runs."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    whole = build_model(make_tiny_config(), seed=0).train()
    batch = make_batch(whole)
    expected = whole(**batch).loss
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for shard in (shard_named, shard_blocks, shard_checkpointed):
        model = build_model(make_tiny_config(), seed=0).train()
        shard(model)
        loss = model(**batch).loss
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for name, parameter in model.named_parameters():
            note = partial("{} of {}: {}".format, shard.__name__, name)
            torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], msg=note)
    dist.destroy_process_group()


def test_sharded_equals_whole(tmp_path: Path) -> None:
    # One start of both processes for all ways to shard: importing takes longer than they do.
    torch.multiprocessing.spawn(compare, (str(tmp_path / "store"),), nprocs=2)
