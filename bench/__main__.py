"""The command line of the benchmarks: `python -m bench --help`, from the repository root."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from bench import session
from bench import stamp as stamps
from bench.record import ResultsMismatch

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Benchmarks; run them from the repository root.")


@app.command()
def gpu(
    minutes: Annotated[float, typer.Option(min=0.1, help="Stop starting steps when these are used up.")] = 30.0,
    out: Annotated[
        Path | None, typer.Option(help="Results folder; default bench/results/<device>/<date>-<commit>.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="List the steps and rehearse each on the CPU; keeps nothing.")] = False,
    only: Annotated[list[str] | None, typer.Option(metavar="STEP", help="This step; may be given again.")] = None,
    force: Annotated[bool, typer.Option(help="Repeat steps whose results are there.")] = False,
    commit: Annotated[str | None, typer.Option(help="Commit of a copy that has no repository.")] = None,
    tree: Annotated[str | None, typer.Option(help="Its tree; goes with --commit.")] = None,
    dirty: Annotated[bool, typer.Option("--dirty", help="The copy differs from --commit.")] = False,
) -> None:
    """Builds, tests and measures on a machine with a GPU and no network; goes on where an earlier run stopped."""
    steps = only or []
    try:
        if dry_run:
            good = session.rehearse(stamps.Stamp("rehearsal", "rehearsal", True), steps, typer.echo)
        else:
            stamp = _stamp(commit, tree, dirty)
            command = " ".join(["python -m bench", *sys.argv[1:]])
            good = session.measure(stamp, minutes, out, steps, force, command, typer.echo)
    except (session.CannotRun, ResultsMismatch, stamps.NoStamp) as error:
        typer.echo(f"bench gpu: {error}", err=True)
        raise typer.Exit(2) from error
    if not good:
        raise typer.Exit(1)


@app.command()
def stamp() -> None:
    """Prints the options that tell `bench gpu` which commit a copy of this repository is."""
    try:
        typer.echo(stamps.from_git().options())
    except stamps.NoStamp as error:
        typer.echo(f"bench stamp: {error}", err=True)
        raise typer.Exit(2) from error


def _stamp(commit: str | None, tree: str | None, dirty: bool) -> stamps.Stamp:
    if commit is None and tree is None:
        return stamps.from_git()
    if commit is None or tree is None:
        raise stamps.NoStamp("--commit and --tree go together; `python -m bench stamp` prints both")
    return stamps.Stamp(commit, tree, dirty)


if __name__ == "__main__":
    app()
