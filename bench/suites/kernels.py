"""Each op at the towers' shapes: eager, every backend with a kernel, the library's best routes, and torch.compile.

Which backends have a kernel is asked of the dispatcher, so a new one is measured without a change here. Backward is
timed alone: the forward runs once, and autograd goes back over the graph that it kept.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.compare import Case, measure
from bench.shapes import LARGE, TINY, TINY_WIDE, VIT, XXLARGE
from bench.step import Result, Run
from bench.suites.kernel_cases import BACKWARD, DIRECTIONS, Inputs, OpCase, as_list, cases, least_work
from bench.suites.kernel_problems import Problem, make_problem, served_by
from bench.suites.library_routes import Route, routes
from bench.timing import Call
from mra_kernels import backend_report
from mra_kernels.dispatch import AUTOMATIC, Choice
from mra_kernels.ops import OPS
from mra_kernels.testing import GRADIENT_FACTOR, VALUE_FACTOR
from mra_model.environment import dtype_name, parse_dtype
from mra_model.memory import available_memory

EAGER = "eager"
COMPILED = "torch.compile"

# Whose shapes are measured, by the name of the ConvNeXt.
MODELS = ("ConvNeXt-L", "ConvNeXt-XXL")


def run(run: Run, *, op: str, batch: int, dtype: str, models: Sequence[str] = MODELS) -> None:
    """Forward and backward of one op at every shape: eager, each kernel backend, the library's routes.

    Args:
        run: of the step.
        op: its name.
        batch: pictures.
        dtype: of maps and parameters, as `bfloat16`.
        models: whose shapes; those of the ViT are the first one's.
    """
    for case in _cases(run, op, models):
        _measure(run, case, batch, parse_dtype(dtype), compiled=False)


def run_compiled(run: Run, *, op: str, batch: int, dtype: str, models: Sequence[str] = MODELS) -> None:
    """The same cases by torch.compile, beside eager and the automatic choice again, so that they took turns.

    On a GPU with `max-autotune`, less the compiler's own CUDA graphs, since the timing makes a graph of every variant.
    On a CPU in the default mode: `max-autotune` there is for frozen weights.
    """
    for case in _cases(run, op, models):
        _measure(run, case, batch, parse_dtype(dtype), compiled=True)


def automatic(op: str, device: torch.device, dtype: torch.dtype) -> list[Route]:
    """Eager, and the backend that the dispatcher chooses, where that is another one."""
    chosen = _choice(op, device, dtype).chosen
    eager = Route(EAGER, served_by(op, "reference"))
    return [eager] if chosen == "reference" else [eager, Route(chosen, served_by(op, chosen))]


def build(problem: Problem, dtype: torch.dtype, direction: str, variants: Sequence[Route]) -> Case:
    """What `compare.measure` and `compare.check` take: the variants in one direction against float64, eager first.

    Args:
        problem: what is computed.
        dtype: of maps and parameters.
        direction: `forward` or `backward`.
        variants: backward leaves those out that are not differentiable.
    """
    case, batch = problem.case, problem.batch
    backward = direction == BACKWARD
    choice = _choice(case.op, problem.grads[0].device, dtype)
    least_bytes, flops = least_work(case, batch, dtype, direction)
    return Case(
        name=_name(case, batch, dtype, direction),
        labels=_labels(case, batch, dtype, direction),
        variants={v.name: _call(problem, direction, v) for v in variants if v.differentiable or not backward},
        outputs=problem.names(direction),
        exact=partial(problem.exact, direction),
        checked=partial(problem.checked, direction),
        slack=problem.slack(direction),
        bytes=least_bytes,
        flops=flops,
        allowed=GRADIENT_FACTOR if backward else VALUE_FACTOR,
        dtype=dtype,
        facts={EAGER: {"auto": choice.chosen, "refused": choice.reasons}},
    )


def _cases(run: Run, op: str, models: Sequence[str]) -> list[OpCase]:
    if run.rehearsal:
        return cases(op, [TINY, TINY_WIDE])
    # What depends on the ViT alone goes with the first model, however many are measured apart.
    wanted = {*models, VIT} if MODELS[0] in models else set(models)
    return [case for case in cases(op, [LARGE, XXLARGE]) if case.model in wanted]


def _measure(run: Run, case: OpCase, batch: int, dtype: torch.dtype, *, compiled: bool) -> None:
    """Records both directions of one case, or that there is too little memory for it."""
    missing = _missing_memory(case, batch, dtype, run.device)
    if missing is not None:
        for direction in DIRECTIONS:
            labels = _labels(case, batch, dtype, direction)
            run.record(Result(_name(case, batch, dtype, direction), EAGER, labels, failure=missing))
        return
    problem = make_problem(case, batch, dtype, run.device)
    for direction in DIRECTIONS:
        if compiled:
            _measure_compiled(run, problem, dtype, direction)
        else:
            variants = _backends(case.op, run.device, dtype) + routes(case.op, problem.inputs)
            measure(run, build(problem, dtype, direction, variants))


def _measure_compiled(run: Run, problem: Problem, dtype: torch.dtype, direction: str) -> None:
    op = problem.case.op
    options: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"} if run.device.type == "cuda" else {}
    # A rehearsal has no compiler to rely on; the tracing is the same.
    compiled = torch.compile(OPS[op].reference, dynamic=False, **run.pick(options, {"backend": "eager"}))

    def function(inputs: Inputs) -> list[Tensor]:
        return as_list(compiled(*inputs.values()))

    variants = [*automatic(op, run.device, dtype), Route(COMPILED, function)]
    case = build(problem, dtype, direction, variants)
    case.labels["compiled"] = True
    case.facts[COMPILED] = {"mode": options.get("mode", "default")}
    # A graph that is kept for many backwards may not give its buffers away.
    with torch._functorch.config.patch(donated_buffer=False):
        measure(run, replace(case, name=f"{case.name}, compiled"))
    # Compiled code is kept by function for a few shapes; the next ones would run uncompiled.
    torch.compiler.reset()


def _backends(op: str, device: torch.device, dtype: torch.dtype) -> list[Route]:
    """Eager, and every backend that has a kernel."""
    refused = _choice(op, device, dtype).reasons
    kernels = [name for name in AUTOMATIC if name != "reference" and name not in refused]
    return [Route(EAGER, served_by(op, "reference")), *(Route(name, served_by(op, name)) for name in kernels)]


def _choice(op: str, device: torch.device, dtype: torch.dtype) -> Choice:
    return next(choice for choice in backend_report(device, dtype) if choice.op == op)


def _call(problem: Problem, direction: str, variant: Route) -> Call:
    call = problem.call(direction, variant.function)
    if variant.context is nullcontext:
        return call

    def inside() -> Sequence[Tensor]:
        with variant.context():
            return call()

    return inside


def _name(case: OpCase, batch: int, dtype: torch.dtype, direction: str) -> str:
    return f"{case.name}, B={batch} {dtype_name(dtype)} {direction}"


def _labels(case: OpCase, batch: int, dtype: torch.dtype, direction: str) -> dict[str, str | int | bool]:
    return {
        "suite": "kernels",
        "op": case.op,
        "shape": case.shape,
        "model": case.model,
        "place": case.place,
        "batch": batch,
        "dtype": dtype_name(dtype),
        "direction": direction,
        "compiled": False,
    }


def _missing_memory(case: OpCase, batch: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the case is not tried, by an estimate: data and graphs of several variants, and float64 of one picture."""
    least, _ = least_work(case, batch, dtype, BACKWARD)
    needed = 5 * least + 6 * (least // batch) * 8 // dtype.itemsize
    available = available_memory(device)
    if needed <= available:
        return None
    return f"not measured: needs about {needed / 2**30:.0f} GiB, and {available / 2**30:.0f} GiB are available"
