"""The documentation keeps its word: Python runs, commands and files exist, every op has its place, nothing is fetched.

A page's Python blocks run in order, in one namespace, in a folder that holds what the pages speak of: `LLaVA-HR-7B`, a
tiny checkpoint in the authors' format, the same converted, `llava-hr-7b-hf`, and `photo.jpg`. A block with a title
`needs ...` is not run, but its imports are.
"""

import ast
import inspect
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import add_tokenizer, arch_of, read_checkpoint, with_vocabulary, write_checkpoint
from typer.main import get_command

import bench.__main__ as benches
from bench.report.data import machines
from mra_kernels import modules
from mra_kernels.ops import OPS
from mra_model import cli
from mra_model.convert import convert

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench/README.md"]
APPS = {"mra": cli.app, "python -m bench": benches.app}

# The hosts that a page may link to. No package registry is among them, and none needs to be.
HOSTS = {"arxiv.org", "localhost:8000", "ui.perfetto.dev"}

_FENCE = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*/[\w-]+\.(?:py|cuh|cu|cpp|h|md|json)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    title: str
    code: str
    line: int

    @property
    def runs(self) -> bool:
        """Whether a CPU with the test's folder can run it."""
        return self.language == "python" and "needs " not in self.title


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[2], match[3], textwrap.dedent(match[4]), text[: match.start()].count("\n") + 2)
        for match in _FENCE.finditer(text)
    ]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """The folder in which pages run."""
    folder = tmp_path_factory.mktemp("docs")
    golden = "llava_hr_tiny_384"
    source = write_checkpoint(folder / "LLaVA-HR-7B", *with_vocabulary(*read_checkpoint(golden), 640))
    shutil.copy(arch_of(golden), add_tokenizer(source) / "arch.json")
    convert(source, folder / "llava-hr-7b-hf", arch=source / "arch.json")
    shutil.copy(data_dir / "llava_data/chelsea.png", folder / "photo.jpg")
    return folder


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language == "python" for b in blocks(p))], ids=name)
def test_python_runs(page: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.language != "python":
            continue
        # Empty lines in front, so that a traceback has the page's line.
        tree = ast.parse("\n" * (block.line - 1) + block.code, filename=name(page))
        if not block.runs:
            tree.body = [
                node
                for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom) and "bitsandbytes" not in ast.unparse(node)
            ]
        exec(compile(tree, name(page), "exec"), namespace)


def commands(page: Path) -> Iterator[tuple[str, bool]]:
    """Every command line, and whether it is whole: one in a sentence may leave out its arguments."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        if not block.language:
            lines = re.sub(r"\\\n\s*", "", block.code).splitlines()
            yield from ((line.strip(), True) for line in lines if line.strip())
    yield from ((span[1], False) for span in _SPAN.finditer(_FENCE.sub("", text)))


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_commands_exist(page: Path) -> None:
    """Each command line is parsed by the command that it names, without running it."""
    for line, whole in commands(page):
        words = shlex.split(re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line), comments=True) if " " in line else []
        for start, app in APPS.items():
            prefix = start.split()
            if words[: len(prefix)] == prefix and len(words) > len(prefix) and words[len(prefix)].isalpha():
                problem = complaint(app, words[len(prefix) :])
                assert problem is None or (not whole and "Missing" in problem), f"{name(page)}: {line}: {problem}"
        if words[:1] == ["make"]:
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(words[1:]) <= set(targets), f"{name(page)}: {line}: the Makefile has {targets}"


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_options_exist(page: Path) -> None:
    """An option in a sentence, `--like-this VALUE`, belongs to some command."""
    groups = [get_command(app) for app in APPS.values()]
    known = {
        option
        for group in groups
        for command in group.commands.values()  # type: ignore[attr-defined]
        for parameter in command.params
        for option in parameter.opts
    }
    used = {line.split()[0] for line, whole in commands(page) if not whole and re.match(r"--[a-z]", line)}
    assert used <= known


def complaint(app: object, words: list[str]) -> str | None:
    """What the command says of its arguments, None where it takes them."""
    group = get_command(app)  # type: ignore[arg-type]
    if words[0] not in group.commands:
        return f"there is no command {words[0]!r}, only {', '.join(group.commands)}"
    command = group.commands[words[0]]
    try:
        command.make_context(words[0], words[1:], resilient_parsing=False).close()
    except Exception as error:
        # Typer's own classes of errors have moved between its versions.
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_exist(page: Path) -> None:
    """A path in a sentence is a file of the repository."""
    spans = _SPAN.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
    absent = [span for span in spans if _PATH.fullmatch(span) and not (ROOT / span).is_file()]
    assert absent == []


@pytest.mark.parametrize("page", [*PAGES, *DOCS.rglob("*.svg"), DOCS / "assets/style.css"], ids=name)
def test_no_other_hosts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://([^/\s)\"'>]+)", text)) <= HOSTS
    assert "index-url" not in text


def test_every_op_has_its_place() -> None:
    """In the reference and, with a page of its own or a shared one, among the kernels."""
    reference, kernels = (DOCS / "ops.md").read_text(), (DOCS / "kernels/index.md").read_text()
    for op in OPS:
        assert f"::: mra_kernels.ops.{op}.{op}\n" in reference
        page = re.search(rf"\[`{op}`\]\((\w+\.md)\)", kernels)
        assert page, f"kernels/index.md has no row for {op}"
        assert op in (DOCS / "kernels" / page[1]).read_text()


def test_every_module_has_its_place() -> None:
    reference = (DOCS / "ops.md").read_text()
    for kind, _ in inspect.getmembers(modules, inspect.isclass):
        if getattr(modules, kind).__module__ == modules.__name__:
            assert f"::: mra_kernels.modules.{kind}\n" in reference


def test_what_was_measured_is_shown() -> None:
    """An op with results has a table of them, and only such an op: the others say that they were not measured."""
    pages = "".join(page.read_text() for page in (DOCS / "kernels").glob("*.md"))
    shown = set(re.findall(r"<!-- measured: (\w+) -->", pages))
    measured = {
        subject.labels["op"] for machine in machines(ROOT / "bench/results") for subject in machine.subjects("kernels")
    }
    assert shown == measured
