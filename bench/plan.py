"""Every step, most important first: what is cut off when the minutes run out is at the end.

Nothing here imports a suite: suites import the package that the first step on a GPU builds.
"""

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

from bench.step import Run, Step

# By command, the first parts of the names of its steps. `gpu` is `all` on a GPU.
SUITES = {
    "kernels": ("ceilings", "kernels", "compile", "library", "gemms"),
    "vision": ("vision",),
    "e2e": ("e2e",),
    "train": ("train",),
    "profile": ("profile",),
}

# The ones that the paper's architecture stands or falls with come first.
FIRST_OPS = ("depthwise_conv_norm", "depthwise_conv_gelu", "gated_projection_add", "gated_resample_add", "adapter_gate")
OPS = (
    *FIRST_OPS,
    "add_norm",
    "attention",
    "linear_gelu",
    "linear_scale_residual",
    "norm_patchify",
    "patch_conv_norm",
    "project_mean",
)

# Whose shapes depend on the ViT alone: what is measured for ConvNeXt-L is all there is.
SAME_IN_XXL = frozenset(("depthwise_conv_gelu", "gated_resample_add", "adapter_gate", "add_norm", "attention"))

# Of an op at B=1 on two cores, with the shapes of ConvNeXt-L.
_CPU_SECONDS = {
    "depthwise_conv_norm": 70.0,
    "depthwise_conv_gelu": 15.0,
    "gated_projection_add": 8.0,
    "gated_resample_add": 8.0,
    "adapter_gate": 4.0,
    "add_norm": 4.0,
    "attention": 10.0,
    "linear_gelu": 50.0,
    "linear_scale_residual": 80.0,
    "norm_patchify": 15.0,
    "patch_conv_norm": 20.0,
    "project_mean": 4.0,
}

# By family and side of the picture, seconds of an answer's step on two cores.
_SIDES = {
    "LLaVA-HR": {1024: 130.0, 384: 50.0, 768: 90.0, 1536: 300.0},
    "LLaVA-1.5": {1022: 250.0, 336: 30.0, 448: 45.0, 672: 100.0},
}

# ConvNeXts of transformers for `--model hf:NAME`, widths and depths; the sides that they are measured at.
BACKBONES = {
    "convnext_tiny": ((96, 192, 384, 768), (3, 3, 9, 3)),
    "convnext_small": ((96, 192, 384, 768), (3, 3, 27, 3)),
    "convnext_base": ((128, 256, 512, 1024), (3, 3, 27, 3)),
    "convnext_large": ((192, 384, 768, 1536), (3, 3, 27, 3)),
    "convnext_xlarge": ((256, 512, 1024, 2048), (3, 3, 27, 3)),
}
BACKBONE_SIDES = (224, 384, 512, 768, 1024)


class NoSuchStep(ValueError):
    """No step has this name; the message lists those that there are."""


def call(suite: str, function: str, arguments: dict[str, Any], run: Run) -> None:
    """Imports a suite and runs one of its functions.

    Only here, in the worker: a suite that cannot be imported must cost only its own steps.
    """
    getattr(import_module(f"bench.suites.{suite}"), function)(run, **arguments)


def select(command: str, device_type: str, only: Sequence[str] = (), model: str | None = None) -> list[Step]:
    """The steps of a command on a device, most important first.

    Args:
        command: a key of `SUITES`, or `all` or `gpu` for everything.
        device_type: `cpu` or `cuda`.
        only: globs of names; empty for all.
        model: measures this one in place of the command's; `hf:` and a key of `BACKBONES`, or `timm:` and timm's name.

    Raises:
        NoSuchStep: a glob matches none, or there is no such model.
    """
    steps = STEPS if model is None else backbone(model)
    here = [step for step in steps if device_type in step.seconds and step.name.split("/")[0] in _rooms(command)]
    for glob in only:
        if not any(fnmatchcase(step.name, glob) for step in here):
            names = ", ".join(step.name for step in here)
            raise NoSuchStep(f"no step of {command} on {device_type} is called {glob}; there are {names}")
    return [step for step in here if not only or any(fnmatchcase(step.name, glob) for glob in only)]


def _rooms(command: str) -> set[str]:
    """The first parts of the names of a command's steps."""
    return set(SUITES[command]) if command in SUITES else {step.name.split("/")[0] for step in STEPS}


def _in(suite: str, function: str = "run", **arguments: Any) -> Callable[[Run], None]:
    return partial(call, suite, function, arguments)


def _checks() -> Iterator[Step]:
    about = "pip install -e . with CUDA, from this checkout, offline"
    yield Step("build", about, {"cuda": 90}, _in("checks", "build"))
    about = "pytest -m gpu: ops, modules and golden checkpoints on the device"
    yield Step("tests", about, {"cuda": 150}, _in("checks", "tests"))


def _ceilings() -> Iterator[Step]:
    yield Step("ceilings", "a large copy and a large product, random data", {"cuda": 30, "cpu": 40}, _in("ceilings"))


def _kernels(
    ops: Sequence[str], batches: Sequence[int], dtypes: Sequence[str], *, xxl: bool = False, compiled: bool = False
) -> Iterator[Step]:
    """The ops at the shapes of ConvNeXt-L or -XXL, beside the library or beside torch.compile."""
    room, beside = ("compile", " and torch.compile") if compiled else ("kernels", ", every backend and the library")
    function = "run_compiled" if compiled else "run"
    model = "ConvNeXt-XXL" if xxl else "ConvNeXt-L"
    for dtype, batch, op in product(dtypes, batches, ops):
        if xxl and op in SAME_IN_XXL:
            continue
        cuda, cpu = (60 + 4.0 * batch, 80 + 40.0 * batch) if compiled else (12 + batch, _CPU_SECONDS[op] * batch)
        seconds = {"cuda": cuda} | ({} if dtype == "float16" else {"cpu": 2 * cpu if xxl else cpu})
        about = f"{op} by eager{beside}, shapes of {model}, B={batch} {dtype}"
        run = _in("kernels", function, op=op, batch=batch, dtype=dtype, models=(model,))
        yield Step(f"{room}/{op}/b{batch}/{dtype}" + ("/xxl" if xxl else ""), about, seconds, run)


def _baselines(batch: int) -> Iterator[Step]:
    about = f"library depthwise 7x7, forward and both gradients, cuDNN and native, four stage shapes, B={batch}"
    yield Step(f"library/b{batch}", about, {"cuda": 35 + 5.0 * batch}, _in("library", batch=batch))
    about = f"the tower's matrix products and attention alone, summed over a forward, B={batch}"
    seconds = {"cuda": 30 + 2.5 * batch} | ({"cpu": 90.0} if batch == 1 else {})
    yield Step(f"gemms/b{batch}", about, seconds, _in("gemms", batch=batch))


def _vision(what: str, batch: int) -> Step:
    """`what` is one of the kinds below."""
    kinds: dict[str, tuple[str, str, dict[str, Any], float, float | None]] = {
        "forward": ("forward, eager, fused and optimized", "run_forward", {}, 50, 320),
        "training": ("training step", "run_training", {"checkpointing": False}, 60, 500),
        "checkpointing": ("training step with checkpointing", "run_training", {"checkpointing": True}, 70, 600),
        "compile": ("forward, torch.compile beside the others", "run_compiled", {"mode": None}, 125, 530),
        "max-autotune": ("forward, torch.compile in that mode", "run_compiled", {"mode": "max-autotune"}, 300, None),
    }
    about, function, arguments, cuda, cpu = kinds[what]
    seconds: dict[str, float] = {"cuda": cuda}
    if batch == 1 and cpu is not None:
        seconds["cpu"] = cpu
    run = _in("vision", function, batch=batch, **arguments)
    return Step(f"vision/{what}/b{batch}", f"the tower's {about}, B={batch}", seconds, run)


def backbone(model: str) -> list[Step]:
    """The steps of one ConvNeXt of transformers or timm, for `select`."""
    family, _, name = model.partition(":")
    if not name or family not in ("hf", "timm") or (family == "hf" and name not in BACKBONES):
        known = ", ".join(f"hf:{each}" for each in BACKBONES)
        raise NoSuchStep(f"no model is called {model}; there are {known}, and timm:NAME for every ConvNeXt of timm")
    dims, depths = BACKBONES.get(name, BACKBONES["convnext_large"])
    steps = []
    for direction, factor in (("forward", 1.0), ("training", 3.0)):
        for side in BACKBONE_SIDES:
            flops = factor * side**2 * sum(d * w**2 / 4**i for i, (w, d) in enumerate(zip(dims, depths, strict=True)))
            seconds = {"cuda": 60.0, "cpu": 10 + 3e-9 * flops}
            about = f"{model}, {direction} at {side}, eager, channels last and by apply_mra_kernels"
            run = _in("backbones", f"run_{direction}", model=model, side=side)
            steps.append(Step(f"vision/{model}/{direction}/{side}", about, seconds, run))
    return steps


def _launches() -> Step:
    about = "how many kernels the tower's forward launches, counted by tracing, B=1"
    return Step("vision/launches/b1", about, {"cuda": 15.0, "cpu": 15.0}, _in("launches"))


def _answers(family: str, sides: Sequence[int], languages: Sequence[str]) -> Iterator[Step]:
    for language in languages:
        for side in sides:
            seconds: dict[str, float] = {"cpu": _SIDES[family][side]} if language == "small" else {"cuda": 180.0}
            about = f"an answer of {family}, language model {language}, a picture of {side}"
            run = _in("e2e", family=family, language=language, side=side)
            yield Step(f"e2e/{family.lower()}/{language.lower()}/{side}", about, seconds, run)


def _training() -> Iterator[Step]:
    for stage in (2, 1):
        for checkpointing in (False, True):
            name = f"train/stage{stage}" + ("/checkpointing" if checkpointing else "")
            about = f"a training step of stage {stage}, {'with' if checkpointing else 'without'} checkpointing"
            seconds = {"cuda": 90.0, "cpu": 260.0 if stage == 2 else 60.0}
            yield Step(name, about, seconds, _in("train", stage=stage, checkpointing=checkpointing))


def _profiles() -> Iterator[Step]:
    for what in ("vision", "generate", "train"):
        about = f"the slowest kernels and a trace of {what}, eager and fused"
        yield Step(f"profile/{what}", about, {"cuda": 60, "cpu": 120}, _in("profile", what=what))


def _all() -> Iterator[Step]:
    """In order of importance; a step that comes twice counts where it comes first."""
    build, tests = _checks()
    yield build
    yield from _ceilings()
    yield tests
    yield from _kernels(FIRST_OPS, (1,), ("bfloat16",))
    yield _vision("forward", 1)
    yield _launches()
    for languages in (("7B", "small"), ("13B",)):
        yield from _answers("LLaVA-HR", (1024,), languages)
        yield from _answers("LLaVA-1.5", (336, 1022), languages)
    yield from _kernels(OPS, (1,), ("bfloat16",))
    yield _vision("training", 1)
    yield _vision("forward", 8)
    yield from _kernels(OPS, (1,), ("float32",))
    yield from _training()
    yield from _profiles()
    for what in ("compile", "checkpointing"):
        yield _vision(what, 1)
    for languages in (("7B", "small"), ("13B",)):
        for family, sides in _SIDES.items():
            yield from _answers(family, tuple(sides), languages)
    yield from _baselines(1)
    yield from _kernels(OPS, (1,), ("bfloat16",), xxl=True)
    yield from _kernels(OPS, (8,), ("bfloat16",))
    yield from _kernels(OPS, (1,), ("bfloat16",), compiled=True)
    for what in ("training", "compile", "checkpointing"):
        yield _vision(what, 8)
    yield from _baselines(8)
    for batch in (1, 8):
        yield _vision("max-autotune", batch)
    yield from _kernels(OPS, (2, 4, 16), ("bfloat16",))
    yield from _kernels(OPS, (8,), ("bfloat16",), compiled=True)
    yield from _kernels(OPS, (2, 4, 8, 16), ("float32",))
    yield from _kernels(OPS, (1, 8), ("float32",), compiled=True)
    yield from _kernels(OPS, (1, 2, 4, 8, 16), ("float16",))
    yield from _kernels(OPS, (2, 4, 8, 16), ("bfloat16",), xxl=True)
    yield from _kernels(OPS, (1, 2, 4, 8, 16), ("float32", "float16"), xxl=True)
    yield from _kernels(OPS, (1, 8), ("bfloat16", "float32"), xxl=True, compiled=True)


STEPS = tuple({step.name: step for step in _all()}.values())
