"""What a compiled kernel says of itself: registers, stack, shared memory, and the instructions of its innermost loop.

Read with `cuobjdump` and `nvdisasm`, which come with CUDA and with Triton; neither needs a GPU.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from math import prod
from pathlib import Path

# One instruction: `/*0080*/  @!P0 FFMA.FTZ R1, R2, R3, R4 ;`
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\S*)([^;]*)")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_SECTION = re.compile(r'^\.section\s+\.text\.([^,\s"]+)')
# A kernel's section of attributes, up to the bounds of its block: three numbers.
_THREADS = re.compile(r"^\.nv\.info\.(\S+)$(?:(?!^\.).)*?EIATTR_MAX_THREADS.*?Value:\s*([0-9a-fx ]+?)\s*$", re.M | re.S)
_USAGE = re.compile(r"Function ([^:\s]+):\s*\n\s*(REG:.*)")

# Multiply-adds on CUDA cores, one or two of them a lane, and products on tensor cores.
_FMAS = {"FFMA": 1, "FFMA2": 2, "HFMA2": 2, "DFMA": 1}
_MMAS = ("HMMA", "HGMMA", "IMMA", "QGMMA", "UTCHMMA", "UTCQMMA")
_SPILLS = ("STL", "LDL")


class NoTools(RuntimeError):
    """cuobjdump or nvdisasm is missing."""


@dataclass(frozen=True)
class Loop:
    """The innermost loop with the most arithmetic; the whole kernel where three quarters of that are in no such loop.

    Attributes:
        instructions: of its body.
        fmas: instructions among them that multiply and add on CUDA cores.
        mmas: those that do so on tensor cores.
        multiply_adds: what `fmas` do in a thread; a packed one does two.
    """

    instructions: int
    fmas: int
    mmas: int
    multiply_adds: int

    @property
    def fma_share(self) -> float:
        """Of the body's instructions."""
        return self.fmas / max(1, self.instructions)


@dataclass(frozen=True)
class Figures:
    """One kernel on one architecture.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread in local memory: spills, and arrays whose index is no constant.
        shared: bytes of a block that are known when it is compiled.
        spills: instructions that move registers to local memory and back.
        threads: of a block at most; 0 where the kernel does not say.
        loop: see `Loop`.
    """

    registers: int
    stack: int
    shared: int
    spills: int
    threads: int
    loop: Loop


def figures(cubin: Path) -> dict[str, Figures]:
    """The figures of every kernel in a cubin, by name.

    Raises:
        NoTools: cuobjdump or nvdisasm is missing.
    """
    usage = _run("cuobjdump", "--dump-resource-usage", str(cubin))
    bodies = _bodies(_run("nvdisasm", "-c", str(cubin)))
    threads = dict(_THREADS.findall(_run("cuobjdump", "--dump-elf", str(cubin))))
    found = {}
    for name, line in _USAGE.findall(usage):
        sizes = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
        body = bodies.get(name, [])
        spills = sum(_opcode(text)[0] in _SPILLS for text in body)
        most = prod(int(side, 16) for side in threads.get(name, "0").split())
        found[name] = Figures(sizes["REG"], sizes["STACK"], sizes["SHARED"], spills, most, innermost(body))
    return found


def innermost(body: list[str]) -> Loop:
    """Of the loops without a loop inside, the one with the most multiply-adds; lines as nvdisasm prints them."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for text in body:
        if match := _LABEL.match(text):
            labels[match[1]] = len(lines)
        else:
            lines.append(text)
    loops = []
    for end, text in enumerate(lines):
        opcode, rest = _opcode(text)
        target = _TARGET.search(rest) if opcode == "BRA" else None
        start = labels.get(target[1]) if target else None
        # A kernel ends with a branch to itself.
        if start is not None and start < end:
            loops.append((start, end + 1))
    inner = [loop for loop in loops if not any(_inside(other, loop) for other in loops if other != loop)]
    counted = [_count(lines[start:end]) for start, end in inner]
    whole = _count(lines)
    best = max(counted, key=lambda loop: (_arithmetic(loop), -loop.instructions), default=whole)
    return best if 4 * _arithmetic(best) >= _arithmetic(whole) else whole


def _arithmetic(loop: Loop) -> int:
    return loop.fmas + loop.mmas


def _inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _count(lines: list[str]) -> Loop:
    found = [_opcode(text) for text in lines]
    # With a product of zeros it is how the compiler writes a constant to a register.
    fmas = [_FMAS[opcode] for opcode, operands in found if opcode in _FMAS and "RZ, RZ" not in operands]
    instructions = sum(opcode != "NOP" for opcode, _ in found)
    return Loop(instructions, len(fmas), sum(opcode in _MMAS for opcode, _ in found), sum(fmas))


def _opcode(text: str) -> tuple[str, str]:
    """Name and operands; empty for what is no instruction."""
    match = _INSTRUCTION.match(text)
    return (match[1], match[3]) if match else ("", "")


def _bodies(disassembly: str) -> dict[str, list[str]]:
    """Labels and instructions by kernel."""
    bodies: dict[str, list[str]] = {}
    body: list[str] | None = None
    for line in disassembly.splitlines():
        text = line.strip()
        if match := _SECTION.match(text):
            body = bodies.setdefault(match[1], [])
        elif re.match(r"\.section\s", text):
            body = None
        elif body is not None and (_LABEL.match(text) or _INSTRUCTION.match(text)):
            body.append(text)
    return bodies


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([find(tool), *arguments], capture_output=True, text=True, check=True).stdout


def find(tool: str) -> str:
    """A tool of CUDA's, from the toolkit or from Triton.

    Raises:
        NoTools: it is nowhere.
    """
    places = [None, "/usr/local/cuda/bin"]
    try:
        import triton.backends.nvidia

        places.insert(0, str(Path(triton.backends.nvidia.__file__).parent / "bin"))
    except ImportError:
        pass
    for place in places:
        if found := shutil.which(tool, path=place):
            return found
    raise NoTools(f"{tool} was not found: install the CUDA toolkit, or pip install 'triton>=3.6', which brings it")
