"""Turns CUDA C++ into C++: the three constructs that no header can supply. Line numbers stay as they are.

    __shared__ float tile[8][33];                    a block's variable, which the engine allocates for each block
    extern __shared__ __align__(16) float memory[];  the launch's dynamic shared memory
    kernel<<<grid, block, bytes, stream>>>(a, b);    a launch

Everything else in a source, its qualifiers included, is the business of the stand-in headers.
"""

import re

_ALIGNMENT = r"(?:__align__\s*\((?P<alignment>[^()]*(?:\([^()]*\))?[^()]*)\)\s*)?"
_SHARED = re.compile(rf"(?P<extern>\bextern\s+)?(?:\bstatic\s+)?\b__shared__\s+{_ALIGNMENT}(?P<declaration>[^;]*);")
_DECLARATION = re.compile(r"(?P<type>.*[\s>*&])(?P<name>\w+)\s*(?P<dimensions>(?:\[.*\])?)", re.DOTALL)
_LAUNCH = re.compile(
    r"(?P<kernel>\([^;{}]*?\)|[A-Za-z_][\w:]*(?:<[^;{}<>]*(?:<[^;{}<>]*>[^;{}<>]*)*>)?)\s*<<<(?P<configuration>.+?)>>>\s*\(",
    re.DOTALL,
)
_COMMENT_OR_LITERAL = re.compile(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])'""", re.DOTALL)


class TranslationError(ValueError):
    """A construct in a form that is not understood; the message has its place and the remedy."""


def translate(source: str, path: str = "<source>") -> str:
    """The text of a CUDA C++ file as C++ for the stand-in headers.

    Args:
        source: the file's text.
        path: what diagnostics of the compiler and of the simulator call it.

    Raises:
        TranslationError: a `__shared__` declaration of several variables, or with an initializer.
    """
    # Comments and strings are set aside, so that nothing in them is taken for code.
    aside: list[str] = []

    def put_aside(match: re.Match) -> str:
        aside.append(match[0])
        return f"@{len(aside) - 1}@" + "\n" * match[0].count("\n")

    def put_back(match: re.Match) -> str:
        original = aside[int(match[1])]
        return original + match[2][original.count("\n") :]

    def line_of(position: int) -> int:
        return text.count("\n", 0, position) + 1

    def shared(match: re.Match) -> str:
        return _shared(match, f"{path}:{line_of(match.start())}")

    text = _COMMENT_OR_LITERAL.sub(put_aside, source)
    text = _SHARED.sub(shared, text)
    text = _LAUNCH.sub(_launch, text)
    text = re.sub(r"@(\d+)@(\n*)", put_back, text)
    return f'#line 1 "{path}"\n{text}'


def _shared(match: re.Match, place: str) -> str:
    declaration = _DECLARATION.fullmatch(match["declaration"])
    if declaration is None or re.search(r"[={}]", match["declaration"]):
        raise TranslationError(
            f"{place}: cannot read `{match[0].strip()}`; write one `__shared__ __align__(n) type name[size];` a "
            f"variable, without an initializer"
        )
    kind, name, dimensions = declaration["type"].strip(), declaration["name"], declaration["dimensions"]
    if re.search(r",(?![^<(\[]*[>)\]])", kind + dimensions):
        raise TranslationError(f"{place}: several variables in one __shared__ declaration; write one for each")
    alignment = match["alignment"] or "1"
    newlines = "\n" * match[0].count("\n")
    if match["extern"]:
        return f"CUDA_SIMULATOR_DYNAMIC_SHARED({name}, {alignment}, {kind});{newlines}"
    return " ".join(f"CUDA_SIMULATOR_SHARED({name}, {alignment}, {kind} {dimensions});".split()) + newlines


def _launch(match: re.Match) -> str:
    kernel = match["kernel"] if match["kernel"].startswith("(") else f"({match['kernel']})"
    return f"CUDA_SIMULATOR_LAUNCH({kernel}, {match['configuration']})("
