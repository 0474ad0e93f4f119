"""Mutation tests of the CUDA C++ kernels: small changes of their sources, which the simulator's cases must notice.

`make mutants` changes every device file below `csrc/cuda` in 20 places, chosen by a fixed seed, builds each mutant for
the simulator, and runs the cases of the ops that use it, until one fails, then the sanitizers; as many files at a time
as there are cores. What does not compile is replaced by another change. Results are kept in `build/mutants.json` under
the contents of the file, so that an interrupted run goes on. A survivor must stand, with its reason, in
`mutants_survivors.toml`, or the command fails.
"""

import argparse
import json
import math
import os
import random
import re
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import product
from pathlib import Path
from subprocess import TimeoutExpired
from threading import Lock

import torch
from cuda_simulator import ORDERS, BuildError, build, run_python
from op_calls import Route, check
from simulated_cases import LAYOUTS, SHAPES, check_not_finite, operands, run
from simulated_ops import FOLDER, ROOT, Extension, program, simulated

TESTS = Path(__file__).parent
RESULTS = ROOT / "build/mutants.json"
SURVIVORS = TESTS / "mutants_survivors.toml"

# The ops whose cases run a device file, the quickest first.
DEPTHWISE = ("depthwise_conv_gelu", "depthwise_conv_norm")
USERS: dict[str, tuple[str, ...]] = {
    "depthwise_conv7": DEPTHWISE,
    "depthwise_conv7_mma": DEPTHWISE,
    "depthwise_conv_gelu": ("depthwise_conv_gelu",),
    "depthwise_conv_gelu_backward": ("depthwise_conv_gelu",),
    "depthwise_weight_gradient": DEPTHWISE,
    "depthwise_weight_gradient_mma": DEPTHWISE,
    "gated_resample_add": ("gated_resample_add",),
    "layer_norm": ("norm_patchify", "depthwise_conv_norm"),
    "linear_gelu": ("linear_gelu",),
    "linear_scale_residual": ("linear_scale_residual",),
    "norm_patchify": ("norm_patchify",),
    "patch_conv_norm": ("patch_conv_norm",),
    "patch_conv_norm_mma": ("patch_conv_norm",),
}

# A pattern, and what takes its place; spaces around an operator tell it from a sign, a pointer or a template.
CHANGES: tuple[tuple[str, str], ...] = (
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " + "),
    (r" / ", " * "),
    (r" % ", " / "),
    (r" < ", " <= "),
    (r" <= ", " < "),
    (r" > ", " >= "),
    (r" >= ", " > "),
    (r" == ", " != "),
    (r" && ", " || "),
    (r" \|\| ", " && "),
    (r" \+= ", " = "),
    (r"\b0\b(?!\.)", "1"),
    (r"\b1\b(?!\.)", "2"),
    (r"\b2\b(?!\.)", "3"),
    (r"\btrue\b", "false"),
    (r"\bmin\(", "max("),
    (r"\bmax\(", "min("),
    (r"__syncthreads\(\);", ";"),
    (r"__syncwarp\(\);", ";"),
    (r" \+ eps\b", ""),
)
# Lines that say nothing of what a kernel computes.
_SKIPPED = re.compile(r"^\s*(//|#|template|using|static_assert|__launch_bounds__|__global__|}|namespace)|launch_bounds")

# What takes longer hangs: the address sanitizer needs two minutes for the depthwise cases.
SECONDS = 600
# Held by the thread that writes the results.
_KEEPING = Lock()


@dataclass(frozen=True)
class Mutant:
    """One change: on a line, counted from 1, from a column on, `before` becomes `after`."""

    file: str
    line: int
    column: int
    before: str
    after: str
    text: str

    @property
    def name(self) -> str:
        """Without the line's number, which other changes move."""
        return f"{self.file}: {self.text.strip()} [{self.column}: {self.before.strip()} -> {self.after.strip()}]"


def mutants(file: str, source: str, seed: int) -> Iterator[Mutant]:
    """Every change of a file, in a random order that the seed decides."""
    found = []
    for number, text in enumerate(source.splitlines(), start=1):
        code = text.split("//")[0]
        if _SKIPPED.search(code):
            continue
        for pattern, after in CHANGES:
            for match in re.finditer(pattern, code):
                found.append(Mutant(file, number, match.start(), match[0], after, text))
    random.Random(f"{seed} {file}").shuffle(found)
    yield from found


def apply(mutant: Mutant, source: str) -> str:
    """The file with the change."""
    lines = source.splitlines(keepends=True)
    text, start = lines[mutant.line - 1], mutant.column
    lines[mutant.line - 1] = text[:start] + mutant.after + text[start + len(mutant.before) :]
    return "".join(lines)


def judge(mutant: Mutant, source: str) -> str:
    """`killed`, `survived`, or `invalid` where it does not compile."""
    changed = program({f"cuda/{mutant.file}.cuh": [(source, apply(mutant, source))]})
    ops = USERS[mutant.file]
    # What the cases let through may still be outside an array, which the sanitizers of `make test` see.
    for kind, script, options in (
        ("plain", Path(__file__), ["--library"]),
        ("address", TESTS / "simulated_cases.py", []),
    ):
        try:
            library = build(changed, kind, FOLDER)
        except BuildError:
            return "invalid"
        count = [] if options else ["1", "99"]
        try:
            result = run_python(kind, [str(script), *options, str(library), *count, *ops], [TESTS, ROOT], SECONDS)
        except TimeoutExpired:
            return "killed"
        finally:
            library.unlink(missing_ok=True)
        if result.returncode != 0:
            return "killed"
    return "survived"


def run_cases(library: Path, ops: list[str]) -> None:
    """In a child process, which a bad mutant may end: values and gradients of every case, and all orders of a few.

    What is quick, and finds most, comes first. float16's code is bfloat16's.
    """
    torch.set_num_threads(1)
    on = Extension(library)
    dtypes = (torch.bfloat16, torch.float32)

    def check_values(op: str, dims: tuple, dtype: torch.dtype, layout: str = "contiguous", **settings: int) -> None:
        with simulated(on, **settings):
            check(op, Route("cpu", "native", dtype), *operands(op, dims, dtype, layout))

    for op, dtype in product(ops, dtypes):
        for dims in SHAPES[op]:
            check_values(op, dims, dtype)
    for op, dtype in product(ops, dtypes):
        for dims, layout in product(SHAPES[op][:2], LAYOUTS):
            check_values(op, dims, dtype, layout)
        check_values(op, SHAPES[op][0], dtype, multiprocessors=1)
        if op in DEPTHWISE:
            for width in (24, 3):
                check_not_finite(op, width, dtype, math.nan, on)
    for op, dtype in product(ops, dtypes):
        for number, dims in enumerate(SHAPES[op]):
            orders = ORDERS if number < 2 else ORDERS[:3]
            first, *others = (run(op, *operands(op, dims, dtype), on, order) for order in orders)
            for solution in others:
                assert all(map(torch.equal, solution.outputs, first.outputs))
                assert all(torch.equal(grad, first.grads[name]) for name, grad in solution.grads.items())


def survey(file: str, count: int, seed: int, results: dict[str, str]) -> tuple[int, list[Mutant]]:
    """Judges mutants of a file until `count` compiled; how many those are, and the survivors among them."""
    source = (ROOT / f"csrc/cuda/{file}.cuh").read_text()
    digest = sha256(source.encode()).hexdigest()[:12]
    judged, survivors = 0, []
    for mutant in mutants(file, source, seed):
        if judged == count:
            break
        key = f"{digest} {mutant.line} {mutant.name}"
        if key not in results:
            verdict = judge(mutant, source)
            with _KEEPING:
                results[key] = verdict
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(results, indent=1))
            print(f"{results[key]:9}{mutant.line:4} {mutant.name}", flush=True)
        judged += results[key] != "invalid"
        if results[key] == "survived":
            survivors.append(mutant)
    return judged, survivors


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help=f"of {', '.join(USERS)}; all without it")
    parser.add_argument("--count", type=int, default=20, help="mutants of a file that compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.library is not None:
        run_cases(options.library, options.files)
        return 0
    if unknown := set(options.files) - USERS.keys():
        parser.error(f"{min(unknown)} is none of {', '.join(USERS)}")
    results: dict[str, str] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    reasons = {each["mutant"]: each["why"] for each in tomllib.loads(SURVIVORS.read_text()).get("survivor", [])}
    unexplained = 0
    files = options.files or list(USERS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        surveys = list(pool.map(partial(survey, count=options.count, seed=options.seed, results=results), files))
    for file, (judged, survivors) in zip(files, surveys, strict=True):
        print(f"{file}: {judged - len(survivors)} of {judged} killed")
        for mutant in survivors:
            why = reasons.get(mutant.name)
            unexplained += why is None
            print(f"  {mutant.line}: {mutant.name}\n    {why or 'UNEXPLAINED'}")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
