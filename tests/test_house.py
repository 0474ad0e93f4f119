"""The rules of the house: one name per op in every folder, documented, small files, and who may import whom."""

import ast
import inspect
from pathlib import Path

import pytest
import torch

import mra_kernels
from mra_kernels import ops, reference
from mra_kernels.dispatch import Backend
from mra_kernels.ops import OPS
from mra_kernels.testing import SHAPES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mra_kernels"
MAX_LINES = 400
# The adapter and the merge as a whole: the definition of the modules, not of an op.
NOT_AN_OP = {"mr_adapter"}


def names(folder: Path, suffix: str = ".py") -> set[str]:
    return {p.stem for p in folder.glob(f"*{suffix}") if not p.stem.startswith("_")}


def sources() -> list[Path]:
    """The source files of the repository; of a package that is installed elsewhere, those that are there."""
    folders = ("mra_kernels", "mra_model", "bench", "tests", "csrc")
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh"}
    return sorted(p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in suffixes)


def test_the_twelve_ops() -> None:
    assert len(OPS) == 12
    assert set(OPS) == names(PACKAGE / "ops")
    assert set(OPS) == names(PACKAGE / "reference") - NOT_AN_OP
    assert set(OPS) == set(SHAPES)
    assert set(OPS) <= {p.stem.removeprefix("test_") for p in Path(__file__).parent.glob("test_*.py")}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_kernel_file_or_a_reason(op: str, backend: str) -> None:
    """`native` also has a source in csrc, for the CPU or for CUDA."""
    entry = OPS[op].backends[backend]
    has_file = op in names(PACKAGE / backend)
    if isinstance(entry, str):
        assert not has_file, f"mra_kernels/{backend}/{op}.py is there, but the op gives a reason why not: {entry}"
        assert entry.startswith("no ")
        return
    assert isinstance(entry, Backend)
    assert has_file
    if backend == "native":
        assert op in names(ROOT / "csrc/cpu", ".cpp") | names(ROOT / "csrc/cuda", ".cu")


@pytest.mark.parametrize("op", OPS)
def test_public_function(op: str) -> None:
    """Exported, documented with shapes and errors, its arguments named as in the schema and in the reference."""
    function = getattr(ops, op)
    assert getattr(mra_kernels, op) is function
    assert op in mra_kernels.__all__
    assert op in ops.__all__
    doc = inspect.getdoc(function) or ""
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in doc, f"{op} has no {section}"
    arguments = list(inspect.signature(function).parameters)
    for argument in arguments:
        assert argument in doc, f"{op} does not document {argument}"
    assert "[" in doc.partition("Args:")[2], f"{op} documents no shape"
    schema = getattr(torch.ops.mra, op).default._schema
    assert [a.name for a in schema.arguments if a.name != "keep"] == [*arguments, "backend"]
    definition = getattr(getattr(reference, op, None) or _module(op), op)
    assert list(inspect.signature(definition).parameters) == arguments


def _module(op: str) -> object:
    return __import__(f"mra_kernels.reference.{op}", fromlist=[op])


@pytest.mark.parametrize("op", OPS)
def test_schemas(op: str) -> None:
    """Functional: nothing is aliased or written to; the backward's returns are gradients of the forward's inputs."""
    forward = getattr(torch.ops.mra, op).default._schema
    backward = getattr(torch.ops.mra, f"{op}_backward").default._schema
    assert not forward.is_mutable
    assert not backward.is_mutable
    assert all(a.alias_info is None for s in (forward, backward) for a in (*s.arguments, *s.returns))
    assert [a.name for a in backward.arguments[-2:]] == ["needs", "backend"]
    inputs = {a.name for a in forward.arguments}
    known = inputs | {r.name for r in forward.returns} | {f"grad_{r.name}" for r in forward.returns}
    assert {r.name.removeprefix("grad_") for r in backward.returns} <= inputs
    assert {a.name for a in backward.arguments[:-2]} <= known


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_import_no_model(path: Path) -> None:
    """`mra_kernels` needs torch alone: never `mra_model`, `bench` or transformers."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            imported.add((node.module or "").partition(".")[0])
    assert not imported & {"mra_model", "bench", "transformers", "tests"}


def test_files_are_small() -> None:
    """A file that passes 400 lines is two files."""
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources()}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_every_module_says_what_it_is() -> None:
    for path in sources():
        if path.suffix == ".py" and path.read_text().strip():
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} has no docstring"


def test_device_code_includes_no_torch() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert "torch/" not in path.read_text(), f"{path.relative_to(ROOT)} includes torch"
