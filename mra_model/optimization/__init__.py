"""`optimize`: the vision tower by the fastest route that computes the same, for inference.

`tower.py` is the route, `layers.py` its ViT layers, `packing.py` lays weights side by side, `graphs.py` is a bounded
cache of CUDA graphs, `structure.py` notices between calls that weights moved, and `report.py` says what was done.
"""

import torch
from torch import nn

from mra_model.modeling_mra import MraVisionModel
from mra_model.optimization.report import Optimization
from mra_model.optimization.tower import TowerRoute


def optimize(model: nn.Module, *, max_graphs: int = 4) -> Optimization:
    """Makes the vision tower of a model faster at inference, in place, until `undo()` of what it returns.

    The forward changes only in evaluation mode while autograd does not record; otherwise the plain one runs. Parameters
    stay what they are for `state_dict`, `save_pretrained`, optimizers and PEFT. The query, key and value weights of a
    layer move into one matrix, as do the first 1x1 convolutions of the adapters, which takes no more memory. In-place
    changes of weights, such as `load_state_dict`, take effect at once; `.to()`, a replaced parameter or module, and
    hooks are noticed at the next call. Only the position embedding must not be written to through `.data`, where
    PyTorch counts no changes. A copy of the model, by `deepcopy` or pickle, is a plain one. One that is
    dropped frees its memory at Python's next garbage collection.

    On a GPU a CUDA graph is captured at the first call of each batch, side and pixel dtype, after warm-up; results are
    copies that no later call changes. PyTorch's global settings, such as TF32, are those at capture.

    Args:
        model: a `MraVisionModel`, or a model that contains one, such as `LlavaForConditionalGeneration`.
        max_graphs: CUDA graphs to keep, the most recently used ones; 0 for none. Each holds its input, its output, and
            shares memory for what is between them.

    Returns:
        What is faster, what was left alone and why. The same object if the model is optimized already.

    Raises:
        TypeError: the model has no such tower.
        ValueError: a negative `max_graphs`, or another one than the model is optimized with; a model that FSDP shards.
    """
    towers = [module for module in model.modules() if isinstance(module, MraVisionModel)]
    if len(towers) != 1:
        raise TypeError(f"{type(model).__name__} has {len(towers)} modules of type MraVisionModel, but must have one")
    if max_graphs < 0:
        raise ValueError(f"max_graphs is {max_graphs}, but must be 0 or more")
    if _is_sharded(model):
        raise ValueError("the model is sharded by FSDP, which moves its weights at every call; optimize a whole model")
    tower = towers[0]
    if not isinstance(tower.route, TowerRoute):
        tower.route = TowerRoute(tower, max_graphs)
    elif tower.route.report.max_graphs != max_graphs:
        raise ValueError(
            f"the model is optimized with max_graphs={tower.route.report.max_graphs}, not {max_graphs}; "
            f"call undo() of its report first"
        )
    return tower.route.report


def _is_sharded(model: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())


__all__ = ["Optimization", "optimize"]
