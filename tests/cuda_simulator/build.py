"""Builds CUDA C++ sources for the CPU simulator, with g++, into a shared library. What is built already is reused."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from cuda_simulator.translate import translate

HERE = Path(__file__).parent
ENGINE = sorted((HERE / "engine").glob("*.cpp"))
INCLUDE = HERE / "include"
SUFFIXES = {".h", ".cuh", ".cu"}

# How device code and its launchers are compiled, by build. A local variable that nobody wrote holds a huge number.
BUILDS = {
    "plain": ["-O2", "-g1", "-ftrivial-auto-var-init=pattern"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}
# The engine tells the sanitizers about fibers and barriers, and is not watched itself.
ENGINE_BUILDS = {
    "plain": ["-O2", "-g1"],
    # What it copies, the sanitizer checks in the library's memcpy.
    "address": ["-O2", "-g1", "-fno-builtin", "-DCUDA_SIMULATOR_ASAN"],
    "thread": ["-O2", "-g1", "-DCUDA_SIMULATOR_TSAN"],
}
# Undefined in Python until the sanitizer's library is loaded before everything else.
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
# A loop stays a loop: the sanitizers would count a library's copy as an access of the thread that runs.
LOOPS = "-fno-tree-loop-distribute-patterns"
COMMON = ["-std=c++17", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique", "-Wno-unknown-pragmas"]


class BuildError(RuntimeError):
    """The compiler or the linker failed; the message has what it said."""


@dataclass(frozen=True)
class Program:
    """What a library is made of.

    Args:
        name: of the library.
        root: folder that `#include` starts from; its headers and device code are translated.
        kernels: files below `root` with device code and its launchers, `.cu`.
        host: ordinary C++ sources, which no sanitizer watches.
        host_flags: further flags for those.
        include: folders that are searched before `root`: a header there stands in for the one of the same name, as
            for one whose inline PTX nothing but nvcc understands.
        defines: macros for all sources, as in `NAME=value`.
        edits: by file below `root`, replacements of text that occurs there exactly once.
    """

    name: str
    root: Path
    kernels: Sequence[str]
    host: Sequence[Path] = ()
    host_flags: Sequence[str] = ()
    include: Sequence[Path] = ()
    defines: Sequence[str] = ()
    edits: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)


def build(program: Program, kind: str = "plain", folder: Path = Path("build/cuda_simulator")) -> Path:
    """The path of the library.

    Args:
        program: what to build.
        kind: a key of `BUILDS`.
        folder: keeps objects and libraries under names made from the contents of all that went into them.

    Raises:
        BuildError: with the compiler's output.
        TranslationError: a source that `translate` does not understand.
    """
    folder = folder.resolve()
    tree = _translated(program, folder)
    include = [f"-I{INCLUDE}", *(f"-I{path}" for path in program.include), f"-I{tree}"]
    device = [*COMMON, *_machine_flags(), *BUILDS[kind], "-include", "cuda_runtime.h", *include]
    engine = [*COMMON, LOOPS, *ENGINE_BUILDS[kind], f"-I{INCLUDE}"]
    host = [*COMMON, "-O1", f"-I{program.root}", *program.host_flags]
    defines = [f"-D{define}" for define in program.defines]
    jobs = [(tree / name, [*device, *defines]) for name in program.kernels]
    jobs += [(source, engine) for source in ENGINE]
    jobs += [(source, [*host, *defines]) for source in program.host]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _compile(*job, folder), jobs))
    library = folder / f"{program.name}-{kind}-{_digest(*(o.name for o in objects))}.so"
    if not library.exists():
        sanitize = [flag for flag in BUILDS[kind] if flag.startswith("-fsanitize")]
        # Several libraries can be loaded side by side, each with its own engine.
        _run(["g++", "-shared", "-Wl,-Bsymbolic", *sanitize, *map(str, objects)], library)
    return library


def sanitizer_environment(kind: str) -> dict[str, str]:
    """The environment in which a child process can load a library of this build.

    Raises:
        BuildError: the compiler has no such sanitizer.
    """
    environment = dict(os.environ)
    if kind in RUNTIMES:
        runtime = _output("g++", f"-print-file-name={RUNTIMES[kind]}")
        if not os.path.isabs(runtime):
            raise BuildError(f"g++ has no {RUNTIMES[kind]}; install the compiler's sanitizer libraries")
        environment["LD_PRELOAD"] = runtime
        # Python itself leaks; and a library that nobody instrumented allocates, which a report would blame.
        environment["ASAN_OPTIONS"] = "detect_leaks=0"
        environment["UBSAN_OPTIONS"] = "print_stacktrace=1"
        environment["TSAN_OPTIONS"] = "halt_on_error=1 report_thread_leaks=0"
    return environment


def run_python(
    kind: str, arguments: Sequence[str], path: Sequence[Path] = (), timeout: float = 1200
) -> subprocess.CompletedProcess[str]:
    """Runs Python in a child process that can load a library of this build; a report ends it with an error.

    Args:
        kind: a key of `BUILDS`.
        arguments: of Python.
        path: folders that the child imports from.
        timeout: in seconds.
    """
    command = [sys.executable, *arguments]
    # ThreadSanitizer needs memory where it expects it.
    if kind == "thread" and (setarch := shutil.which("setarch")):
        command = [setarch, "-R", *command]
    environment = sanitizer_environment(kind)
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), environment.get("PYTHONPATH", "")])
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def _translated(program: Program, folder: Path) -> Path:
    """A folder with the translated sources, made once for their contents."""
    unknown = set(program.edits)
    sources = {}
    for path in _files(program.root, SUFFIXES):
        name = str(path.relative_to(program.root))
        text = path.read_text()
        for old, new in program.edits.get(name, ()):
            if text.count(old) != 1:
                raise ValueError(f"{name} has {text.count(old)} places that read {old!r}; an edit needs exactly one")
            text = text.replace(old, new)
        unknown.discard(name)
        sources[name] = translate(text, f"{program.root.name}/{name}")
    if unknown:
        raise ValueError(f"edits of files that are not in {program.root}: {sorted(unknown)}")
    tree = folder / f"tree-{_digest(*sources, *sources.values())}"
    if not tree.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder))
        for name, text in sources.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_text(text)
        try:
            temporary.rename(tree)
        except OSError:
            shutil.rmtree(temporary)
    return tree


def _compile(source: Path, flags: list[str], folder: Path) -> Path:
    include = [Path(flag.removeprefix("-I")) for flag in flags if flag.startswith("-I")]
    contents = _with_headers(source, include).values()
    # The folder of a translated tree is named after its contents, which are what counts.
    key = _digest(_output("g++", "--version"), *(f for f in flags if str(folder) not in f), *contents)
    target = folder / f"{source.stem}-{key}.o"
    if not target.exists():
        _run(["g++", "-c", "-x", "c++", *flags, str(source)], target)
    return target


def _run(command: list[str], target: Path) -> None:
    """Runs a compiler; the target appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        output = Path(temporary) / target.name
        result = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
        if result.returncode != 0:
            raise BuildError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
        output.replace(target)


def _with_headers(source: Path, include: Sequence[Path]) -> dict[Path, str]:
    """The text of a source and of every header of ours that it includes; the system's are the compiler's matter."""
    texts: dict[Path, str] = {}
    waiting = [source, INCLUDE / "cuda_runtime.h"]
    while waiting:
        path = waiting.pop()
        if path in texts:
            continue
        texts[path] = path.read_text()
        for name in re.findall(r'^\s*#\s*include\s*[<"]([^">]+)[">]', texts[path], re.MULTILINE):
            found = next((p for f in (path.parent, *include) if (p := f / name).is_file()), None)
            if found is not None:
                waiting.append(found)
    return texts


def _files(root: Path, suffixes: set[str]) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.suffix in suffixes)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@cache
def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@cache
def _machine_flags() -> list[str]:
    """Fused multiply-add where the processor has it: fast, and contracted as nvcc contracts."""
    cpuinfo = Path("/proc/cpuinfo")
    has_fma = cpuinfo.exists() and " fma " in cpuinfo.read_text()
    return ["-mfma", "-ffp-contract=fast"] if has_fma else []
