"""The command line of the benchmarks: `python -m bench --help`, from the repository root."""

import signal
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from bench import plan
from bench import stamp as stamps

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Benchmarks; run them from the repository root.")


class DeviceName(StrEnum):
    """Where to measure; `auto` is a GPU where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Device = Annotated[DeviceName, typer.Option(help="Where to measure; auto is a GPU where there is one.")]
Minutes = Annotated[
    float | None, typer.Option(min=0.1, help="Start no step that does not fit into what is left of these.")
]
Out = Annotated[Path | None, typer.Option(help="Results folder; default bench/results/<machine>/<date>-<commit>.")]
Only = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Steps of this name; may be given again.")]
Force = Annotated[bool, typer.Option("--force", help="Repeat steps whose results are there.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="List the steps and rehearse each on the CPU, tiny; keeps nothing.")
]
Scratch = Annotated[bool, typer.Option("--scratch", help="Measure whatever is here, and keep nothing.")]
Commit = Annotated[str | None, typer.Option(help="Commit of a copy that has no repository.")]
Tree = Annotated[str | None, typer.Option(help="Its tree; goes with --commit.")]
Dirty = Annotated[bool, typer.Option("--dirty", help="The copy differs from --commit.")]

Model = Annotated[
    str | None,
    typer.Option(metavar="hf:NAME|timm:NAME", help="This ConvNeXt, random weights, eager and by apply_mra_kernels."),
]


@dataclass(frozen=True)
class Options:
    """What every measuring command takes besides its device; only `vision` takes a model."""

    minutes: float | None
    out: Path | None
    only: list[str] | None
    force: bool
    dry_run: bool
    scratch: bool
    commit: str | None
    tree: str | None
    dirty: bool
    model: str | None = None


def _measuring(name: str, help: str) -> None:
    """Adds a command that runs its part of the plan."""

    def command(
        device: Device = DeviceName.auto,
        minutes: Minutes = None,
        out: Out = None,
        only: Only = None,
        force: Force = False,
        dry_run: DryRun = False,
        scratch: Scratch = False,
        commit: Commit = None,
        tree: Tree = None,
        dirty: Dirty = False,
    ) -> None:
        _run(name, device, Options(minutes, out, only, force, dry_run, scratch, commit, tree, dirty))

    app.command(name, help=help)(command)


_measuring(
    "kernels", "Every op beside eager, torch.compile and the library, and the ceilings that they are held against."
)
_measuring("e2e", "Whole answers of LLaVA-HR and LLaVA-1.5: the paper's table.")
_measuring("train", "A training step of stage 1 and stage 2.")
_measuring("profile", "The slowest kernels of eager and fused, and traces for Perfetto.")
_measuring("all", "Everything, most important first.")


@app.command()
def vision(
    model: Model = None,
    device: Device = DeviceName.auto,
    minutes: Minutes = None,
    out: Out = None,
    only: Only = None,
    force: Force = False,
    dry_run: DryRun = False,
    scratch: Scratch = False,
    commit: Commit = None,
    tree: Tree = None,
    dirty: Dirty = False,
) -> None:
    """The vision tower: forward and training step, eager, fused and compiled; or with --model a ConvNeXt of others."""
    _run("vision", device, Options(minutes, out, only, force, dry_run, scratch, commit, tree, dirty, model))


@app.command()
def gpu(
    minutes: Minutes = 30.0,
    out: Out = None,
    only: Only = None,
    force: Force = False,
    dry_run: DryRun = False,
    scratch: Scratch = False,
    commit: Commit = None,
    tree: Tree = None,
    dirty: Dirty = False,
) -> None:
    """Builds, tests and measures everything on a machine with a GPU and no network."""
    _run("gpu", DeviceName.cuda, Options(minutes, out, only, force, dry_run, scratch, commit, tree, dirty))


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder of machines' results.")] = stamps.RESULTS,
    out: Annotated[Path, typer.Option(help="The page to write.")] = stamps.RESULTS / "report.html",
    readme: Annotated[
        Path | None, typer.Option(help="A file whose summary is brought up to date; README.md with the default folder.")
    ] = None,
) -> None:
    """Writes one page of all results that are kept, and the README's summary."""
    from bench import report as reports
    from bench.record import ResultsMismatch
    from bench.report.readme import NoMarkers

    if readme is None and results == stamps.RESULTS:
        readme = stamps.ROOT / "README.md"
    try:
        typer.echo(reports.write(results, out, readme))
    except (ResultsMismatch, NoMarkers) as error:
        _fail("report", error)


@app.command()
def aot(
    arch: Annotated[list[int] | None, typer.Option(help="80, 90 or 100; may be given again; without it all.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Ops, and CUDA C++ kernels, of this name.")
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Triton's kernels in bfloat16, one shape an op.")] = False,
    write: Annotated[Path | None, typer.Option(help="Write a page of tables to this file.")] = None,
) -> None:
    """Compiles every kernel without a GPU: registers, stack, shared memory, instructions. Ends with 1 on a spill."""
    from bench import aot as ahead
    from bench import aot_tables
    from bench.cubin import NoTools

    archs = arch or ahead.ARCHS
    if unknown := set(archs) - set(ahead.ARCHS):
        _fail("aot", ValueError(f"--arch {min(unknown)} is none of {', '.join(map(str, ahead.ARCHS))}"))
    try:
        rows = ahead.triton_rows(archs, only or (), sample, typer.echo) + ahead.cuda_rows(archs, only or (), typer.echo)
    except NoTools as error:
        _fail("aot", error)
    typer.echo(aot_tables.figures(rows))
    if write is not None:
        aot_tables.write(rows, write)
    spilled = [row for row in rows if row.spills and row.excuse is None]
    for row in spilled:
        typer.echo(f"spill: {row.language} {row.kernel} ({row.configuration}) on sm_{row.arch}", err=True)
    if spilled or not rows:
        raise typer.Exit(1)


@app.command()
def stamp() -> None:
    """Prints the options that tell the other commands which commit a copy of this repository is."""
    try:
        typer.echo(stamps.from_git().options())
    except stamps.NoStamp as error:
        _fail("stamp", error)


def _run(name: str, device: DeviceName, options: Options) -> None:
    """Rehearses, tries out or measures a command's steps; exits with 2 if it cannot start and 1 if a step failed."""
    # Imported late, so that `--help` does not wait for it.
    from bench import session
    from bench.record import ResultsMismatch

    try:
        if options.out is not None and (options.dry_run or options.scratch):
            raise session.CannotRun("--dry-run and --scratch keep nothing: leave --out away")
        good = _rehearse(name, device, options) if options.dry_run else _measure(name, device, options)
    except (session.CannotRun, ResultsMismatch, stamps.NoStamp, plan.NoSuchStep) as error:
        _fail(name, error)
    if not good:
        raise typer.Exit(1)


def _rehearse(name: str, device: DeviceName, options: Options) -> bool:
    from bench import session

    # The steps for a GPU can be rehearsed without one.
    kind = session.choose_device("auto").type if device == DeviceName.auto else device.value
    return session.rehearse(plan.select(name, kind, options.only or (), options.model), kind, typer.echo)


def _measure(name: str, device: DeviceName, options: Options) -> bool:
    from bench import session

    chosen = session.choose_device(device.value)
    steps = plan.select(name, chosen.type, options.only or (), options.model)
    if options.scratch:
        return session.try_out(steps, chosen, minutes=options.minutes, say=typer.echo)
    return session.measure(
        steps,
        chosen,
        _stamp(options),
        out=options.out,
        minutes=options.minutes,
        force=options.force,
        command=" ".join(["python -m bench", *sys.argv[1:]]),
        say=typer.echo,
    )


def _stamp(options: Options) -> stamps.Stamp:
    if options.commit is None and options.tree is None:
        return stamps.from_git()
    if options.commit is None or options.tree is None:
        raise stamps.NoStamp("--commit and --tree go together; `python -m bench stamp` prints both")
    return stamps.from_options(options.commit, options.tree, options.dirty)


def _fail(name: str, error: Exception) -> NoReturn:
    typer.echo(f"bench {name}: {error}", err=True)
    raise typer.Exit(2) from error


if __name__ == "__main__":
    # So that whoever is told to stop ends its worker, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app()
