"""The command `mra`. It reads options and prints results; the work is done in the modules that it imports."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import TextStreamer
from transformers.utils import logging

import mra_kernels
from mra_model import compare as comparing
from mra_model import convert as converting
from mra_model import doctor as diagnosing
from mra_model.compare.table import print_comparison
from mra_model.environment import dtype_name, parse_device, parse_dtype
from mra_model.generation import ModelFolderError, generate_text, load_model
from mra_model.images import load_image
from mra_model.launch import CommandError, launch
from mra_model.memory import NotEnoughMemory

# Wrong options end with 2, as the shell's own tools do; what went wrong later ends with 1.
WRONG_OPTION = 2
FAILED = 1

TASKS = Path(__file__).parent / "tasks"

app = typer.Typer(
    help="LLaVA-HR with fused kernels: inspect, convert, ask, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (or fp32, bf16, fp16).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write everything, every sample included, to this file.")]


@app.callback()
def _start() -> None:
    """LLaVA-HR with fused kernels: inspect, convert, ask, compare."""
    logging.disable_progress_bar()
    with _one_line(WRONG_OPTION, ValueError):
        mra_kernels.dispatch.preference()


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Show what is installed, and which backend serves which op. Ends with 1 where something installed is broken."""
    report = diagnosing.diagnose()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        diagnosing.print_report(report, Console())
    if diagnosing.is_broken(report):
        raise typer.Exit(FAILED)


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(help="Folder of an original checkpoint, or mm_projector.bin.")],
    dst: Annotated[Path, typer.Argument(help="New folder for the model in the transformers format.")],
    arch: Annotated[
        Path | None, typer.Option(help="JSON with the towers' sizes, where names do not tell them.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of the tokenizer, where SRC has none.")] = None,
    dtype: Dtype = None,
    llm: Annotated[Path | None, typer.Option(help="Language model's folder, for a checkpoint in parts.")] = None,
    clip: Annotated[Path | None, typer.Option(help="CLIP's folder, for a checkpoint in parts.")] = None,
    convnext: Annotated[Path | None, typer.Option(help="ConvNeXt's file, for a checkpoint in parts.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every renamed key, too.")] = False,
) -> None:
    """Convert an original LLaVA-HR checkpoint to the transformers format."""
    with _one_line(WRONG_OPTION, ValueError):
        wanted = None if dtype is None else dtype_name(parse_dtype(dtype))
    with _one_line(FAILED, converting.ConversionError):
        report = converting.convert(
            src,
            dst,
            arch=arch,
            tokenizer=tokenizer,
            dtype=wanted,
            llm=llm,
            clip=clip,
            convnext=convnext,
            report=_progress_line,
        )
    _print_conversion(report, dst, keys)


@app.command()
def export(
    src: Annotated[Path, typer.Argument(help="Folder that `mra convert` or save_pretrained wrote.")],
    dst: Annotated[Path, typer.Argument(help="New folder for the model in the authors' format.")],
    keys: Annotated[bool, typer.Option("--keys", help="List every renamed key, too.")] = False,
) -> None:
    """Write a converted model back in the authors' format."""
    with _one_line(FAILED, converting.ConversionError):
        report = converting.export(src, dst, report=_progress_line)
    _print_conversion(report, dst, keys)


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Folder that `mra convert` or save_pretrained wrote.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[list[Path] | None, typer.Option(help="A picture's file; may be given several times.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The answer's limit, in tokens.")] = 256,
    dtype: Dtype = None,
    device: Device = "auto",
) -> None:
    """Answer a question about pictures, greedily, word by word; without --image a question of text only."""
    with _one_line(WRONG_OPTION, ValueError, OSError):
        where, wanted = parse_device(device), None if dtype is None else parse_dtype(dtype)
        pictures = [load_image(file) for file in image or []]
    with _clean_interrupt(), _one_line(FAILED, ModelFolderError, NotEnoughMemory):
        loaded = load_model(model, wanted, where)
        tokenizer = loaded.require_processor().tokenizer
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with _clean_interrupt():
        try:
            generate_text(loaded, prompt, pictures, max_new_tokens, streamer)
        except (KeyboardInterrupt, torch.OutOfMemoryError):
            # Prints the word that it still holds, and ends the line in front of the message.
            streamer.end()
            raise


@app.command()
def compare(
    model: Annotated[str | None, typer.Option(help="Folder that `mra convert` or save_pretrained wrote.")] = None,
    preset: Annotated[str | None, typer.Option(help="Named sizes with random weights instead of a model.")] = None,
    image: Annotated[str | None, typer.Option(help="The picture; without it the repository's photo.")] = None,
    size: Annotated[int | None, typer.Option(help="Side in pixels of the square that the model sees.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The question, for a model with a tokenizer.")] = None,
    dtype: Dtype = None,
    device: Device = "auto",
    optimize: Annotated[
        bool, typer.Option("--optimize", help="Optimize the fused side: its tower and decoding.")
    ] = False,
    runs: Annotated[int | None, typer.Option(min=1, help="Timed runs of each side, however long they take.")] = None,
    json_file: Json = None,
) -> None:
    """Compare fused with eager: one picture and prompt, the same parameters, in turns.

    Ends with 1 where vision features differ by more than the dtype's tolerance, or greedy tokens differ.
    """
    started = time.perf_counter()
    options = comparing.Options(model, preset, image, size, prompt, dtype, device, optimize)
    with _one_line(WRONG_OPTION, ValueError, OSError):
        _check_writable(json_file)
        with _one_line(FAILED, NotEnoughMemory, mra_kernels.BackendUnavailable):
            subject = comparing.prepare(options)
            comparing.check_backends(options, subject)
    steps = comparing.stage_count(runs, subject.device)
    with _clean_interrupt(), _one_line(FAILED, ModelFolderError), _progress(steps) as stage:
        comparison = comparing.compare(options, subject, runs, stage, started)
    print_comparison(comparison, Console())
    if json_file is not None:
        _write_json(json_file, comparing.to_json(comparison))
    if comparison.agreement.failures:
        raise typer.Exit(FAILED)


# What follows the program's name is the program's.
@app.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def execute(
    command: Annotated[list[str], typer.Argument(help="A program and its arguments.", metavar="-- COMMAND [ARGS]...")],
) -> None:
    """Run a Python program, such as `transformers serve`, with the model registered in all of its processes."""
    with _one_line(FAILED, CommandError):
        launch(command)


@app.command()
def eval_tasks() -> None:
    """Print the folder of the paper's eleven tasks for lmms-eval's --include_path; their group is llava_hr."""
    typer.echo(TASKS)


@contextmanager
def _one_line(code: int, *kinds: type[Exception]) -> Iterator[None]:
    """Ends the command with one clear line instead of a traceback where one of `kinds` is raised."""
    try:
        yield
    except kinds as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(code) from error


@contextmanager
def _clean_interrupt() -> Iterator[None]:
    """Ctrl-C ends the command with the shell's usual code and no traceback; so does a GPU that is full, with 1."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    except torch.OutOfMemoryError as error:
        typer.echo(
            f"error: {str(error).splitlines()[0]} Choose another --dtype or --device, or compare at a smaller --size.",
            err=True,
        )
        raise typer.Exit(FAILED) from error


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; gives the function to call before each step."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=steps)
        begun = False

        def stage(name: str) -> None:
            nonlocal begun
            bar.update(task, description=name, advance=1 if begun else 0)
            begun = True

        yield stage


def _progress_line(line: str) -> None:
    typer.echo(line, err=True)


def _print_conversion(report: converting.ConversionReport, dst: Path, keys: bool) -> None:
    """Every ignored and missing key with its reason, those of one reason together; renamed ones if asked."""
    console = Console()
    if keys:
        for old, new in report.renamed.items():
            console.print(f"{old} -> {new}", markup=False, highlight=False, soft_wrap=True)
    for title, reasons in (("ignored", report.ignored), ("missing", report.missing)):
        for reason in dict.fromkeys(reasons.values()):
            names = [name for name, why in reasons.items() if why == reason]
            console.print(f"{title}, {reason}: {len(names)}", markup=False, highlight=False, soft_wrap=True)
            for name in names:
                console.print(f"  {name}", markup=False, highlight=False, soft_wrap=True)
    for warning in report.warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False, style="yellow", soft_wrap=True)
    counts = f"{len(report.renamed)} keys renamed, {len(report.ignored)} ignored, {len(report.missing)} missing"
    console.print(f"{dst}: {counts}", markup=False, highlight=False, style="bold green", soft_wrap=True)


def _check_writable(file: Path | None) -> None:
    """Raises before minutes of measuring, rather than after them, where the result cannot be written."""
    if file is None:
        return
    if file.is_dir():
        raise IsADirectoryError(f"--json {file} is a folder; name a file in it")
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {file}: there is no folder {file.parent}; create it first")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)


if __name__ == "__main__":
    app()
