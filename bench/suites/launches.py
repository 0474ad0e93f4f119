"""How many kernels the tower launches at B=1, counted by tracing, which needs no GPU: eager, fused and optimized.

The tower has the real one's depths, adapters and ratio of the grids, but narrow channels, which no count depends on.
What is counted are ATen operators that compute, one launch each; views and allocations are none, and an op of
`mra_kernels` is one where any backend has a kernel for it. Routes are those of a GPU, though tensors are on the CPU. So
these are estimates: there a library may split one operator into several kernels, and an op may be a product and a pass.
The step `vision/forward/b1` counts the kernels themselves.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.compare import Case, check
from bench.step import Result, Run
from bench.suites.vision import EAGER, FUSED, OPTIMIZED
from bench.timing import Call
from mra_kernels import dispatch, use_backend
from mra_kernels.dispatch import Backend
from mra_kernels.testing import VALUE_FACTOR
from mra_model import MraVisionConfig, MraVisionModel, optimize
from mra_model.optimization import layers
from mra_model.presets import preset_config, randomize_parameters

# The ViT's grid is the high-resolution map's, and larger than the position embedding's, as at 1024.
NARROW_SIDE, NARROW_STORED = 160, 56

# Operators that give out memory, or look at it otherwise, without a word of that in their schema.
_NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh")

COUNTED = "by tracing a GPU's routes: ATen operators that compute, an op of mra_kernels as one"


class LaunchCounter(TorchDispatchMode):
    """Counts what launches inside the block, by operator.

    Attributes:
        launches: by the operator's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func`; what it calls itself is not seen."""
        outputs = func(*args, **(kwargs or {}))
        name = func._schema.name
        computes = not func.is_view and not name.startswith(_NO_LAUNCH)
        if computes and any(isinstance(output, Tensor) for output in tree_leaves(outputs)):
            self.launches[name] += 1
        return outputs


def count_launches(call: Call) -> Counter[str]:
    """The launches of one call on a CPU, by operator, the most frequent first."""
    with LaunchCounter() as counter:
        call()
    return Counter(dict(counter.launches.most_common()))


class _OnCpu(TorchDispatchMode):
    """Inside the block an op that backend `triton` was chosen for runs by its reference."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func`."""
        if func.namespace == "mra" and args[-1] == "triton":
            args = (*args[:-1], "reference")
        return func(*args, **(kwargs or {}))


@contextmanager
def routes_of_a_gpu() -> Iterator[None]:
    """Inside the block CPU tensors take the routes of a GPU for which every op has the kernels that it has at all."""

    def why_not(backends: Mapping[str, Backend | str], name: str, *_: object) -> str | None:
        kernel = backends.get(name)
        return kernel if isinstance(kernel, str) else None

    with patch.object(dispatch, "why_not", why_not), patch.object(layers, "on_cpu", lambda _: False), _OnCpu():
        yield


def run(run: Run) -> None:
    """Records the launches by variant, each checked against float64; of a wrong one none."""
    tower, pixels = make_tower(), torch.randn(1, 3, NARROW_SIDE, NARROW_SIDE)
    optimized = make_tower()
    optimize(optimized)
    exact = make_tower().double()
    variants = {
        EAGER: partial(_forward, tower, pixels, "reference"),
        FUSED: partial(_forward, tower, pixels, "auto"),
        OPTIMIZED: partial(_forward, optimized, pixels, "auto"),
    }
    case = Case(
        name="tower launches B=1, traced",
        variants=dict(variants),
        outputs=("features",),
        exact=partial(_forward, exact, pixels.double(), "reference"),
        allowed=VALUE_FACTOR,
        labels={"suite": "vision", "model": "tower", "direction": "launches", "batch": 1, "dtype": "bfloat16"},
    )
    errors, failures = check(case)
    for name, call in variants.items():
        failure = failures.get(name)
        launches = Counter() if failure else count_launches(call)
        facts = {"counted": COUNTED, "operators": dict(launches)}
        run.record(
            Result(
                case.name,
                name,
                case.labels,
                errors=errors.get(name, {}),
                launches=launches.total() or None,
                failure=failure,
                facts=facts,
            )
        )


def make_tower() -> MraVisionModel:
    """The tower of a picture of 1024 with narrow channels, random and always the same, in bfloat16 on the CPU."""
    real: MraVisionConfig = preset_config("llava-hr-cpu").vision_config
    low, high = real.low_config, real.high_config
    config = MraVisionConfig(
        image_size=NARROW_SIDE,
        low_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": low.num_hidden_layers,
            "num_attention_heads": 4,
            "hidden_act": low.hidden_act,
            "image_size": NARROW_STORED,
            "patch_size": low.patch_size,
        },
        high_config={"hidden_sizes": [8, 16, 24, 48], "depths": high.depths},
    )
    tower = MraVisionModel(config)
    randomize_parameters(tower)
    return tower.bfloat16().eval()


@torch.no_grad()
def _forward(tower: MraVisionModel, pixels: Tensor, backend: str) -> Tensor:
    """pixels: [1, 3, S, S] -> features [1, L, C]."""
    with use_backend(backend), routes_of_a_gpu():
        return tower(pixels).last_hidden_state
