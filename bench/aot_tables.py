"""The tables of `bench aot`, as Markdown: for a terminal, and for the documentation."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.aot import Row, work

HEAD = """# Kernel figures

What the compilers made of every kernel, read from the binaries; no GPU was asked. Written by
`python -m bench aot --write docs/kernel-figures.md`.

"Stack" are bytes of a thread in local memory, where spilled registers go. "Warps" are those that registers and shared
memory let run on a multiprocessor, of 64; a launch of a CUDA C++ kernel may ask for more shared memory than is counted
here. "FMA" and "MMA" are the shares of multiply-adds on CUDA cores and of products on tensor cores among the
instructions of the innermost loop. "Useful" is the share of its multiply-adds that the sums of a depthwise convolution
need; the others are of GELU, of addresses, or waste.
"""


def figures(rows: Sequence[Row]) -> str:
    """One line a kernel."""
    lines = []
    for row in rows:
        loop = row.figures.loop
        warps = row.warps_per_multiprocessor
        lines.append(
            [
                f"`{row.kernel}`",
                row.configuration,
                row.users,
                f"sm_{row.arch}",
                str(row.figures.registers),
                str(row.figures.stack) + ("" if row.excuse is None else f" ({row.excuse})"),
                f"{row.shared:,}",
                "" if warps is None else str(warps),
                _share(loop.fmas, loop.instructions),
                _share(loop.mmas, loop.instructions),
                "" if row.useful is None else f"{100 * row.useful:.0f}%",
            ]
        )
    titles = ["kernel", "configuration", "of", "GPU", "registers", "stack", "shared", "warps", "FMA", "MMA", "useful"]
    return _table(titles, lines, numbers=7)


def floors() -> str:
    """One line a case."""
    lines = [
        [name, direction, f"{moved / 1e6:,.1f}", "" if flops is None else f"{flops / 1e9:,.1f}", f"{1e6 * floor:,.1f}"]
        for name, direction, moved, flops, floor in work()
    ]
    return _table(["case", "direction", "MB", "GFLOP", "floor, us"], lines, numbers=3)


def write(rows: Sequence[Row], file: Path) -> None:
    """The page: bfloat16 on sm_90, and for each other architecture and dtype what differs in kind, a spill."""
    shown = [row for row in rows if row.arch == 90 and (row.language != "Triton" or "bfloat16" in row.configuration)]
    parts = [HEAD]
    for language in dict.fromkeys(row.language for row in rows):
        chosen = [row for row in rows if row.language == language]
        spilled = sum(row.spills for row in chosen)
        archs = ", ".join(f"sm_{arch}" for arch in sorted({row.arch for row in chosen}))
        parts.append(f"## {language}\n\n{len(chosen)} kernels for {archs}; {spilled} use a stack. Those for sm_90:\n")
        parts.append(figures([row for row in shown if row.language == language]))
    parts.append(
        "## Least work\n\nBytes that must move, each input read and each result written once, operations, and the "
        "longer of their times\non an H200 by its data sheet (4.8 TB/s; 989 TFLOP/s on tensor cores): one picture of "
        "1024 x 1024, bfloat16.\n"
    )
    parts.append(floors())
    file.write_text("\n".join(parts), encoding="utf-8")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%" if part else ""


def _table(titles: Sequence[str], lines: Iterable[Sequence[str]], numbers: int) -> str:
    """Markdown; the last `numbers` columns are aligned to the right."""
    rule = ["---"] * (len(titles) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(line)} |" for line in [titles, rule, *lines]) + "\n"
