"""Pictures by matplotlib as inline SVG: the page's own fonts and colors, the same bytes for the same data, hints.

Colors are variables of the page, so that one picture serves light and dark. Matplotlib knows no variables: it draws
with stand-ins that no one else uses, which are replaced in the text of the SVG.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from html import escape
from io import StringIO
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

# By variable of the page's style, the stand-in.
_VARIABLES = {
    name: f"#0{index:x}fe0{index:x}" for index, name in enumerate(("ink", "soft", "grid", "ours", "loss"))
} | {name: f"#0{index:x}ef0{index:x}" for index, name in enumerate(("rival", "page"))}
INK, SOFT, GRID, OURS, LOSS = (_VARIABLES[name] for name in ("ink", "soft", "grid", "ours", "loss"))
RIVAL, PAGE = _VARIABLES["rival"], _VARIABLES["page"]

# Okabe and Ito's colors, which the color-blind tell apart, on white and on black; those for areas beside each other.
AREAS = ("#999999", "#56b4e9", "#0072b2", "#009e73", "#f0e442", "#e69f00", "#d55e00", "#cc79a7")

FONT_SIZE = 9.0

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mra",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": FONT_SIZE,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": SOFT,
    "axes.titlesize": FONT_SIZE,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": FONT_SIZE,
    "text.color": INK,
    "xtick.color": GRID,
    "xtick.labelcolor": SOFT,
    "ytick.color": GRID,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "hatch.linewidth": 0.8,
}

_HINT = "hint-"

# Digits behind the second one are below what a screen shows.
_LONG_NUMBER = re.compile(r"(\d\.\d\d)\d+")


class Hints:
    """What the reader is told who points at a mark."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def give(self, mark: Artist, text: str) -> None:
        """Lets `mark` tell `text`."""
        mark.set_gid(f"{_HINT}{len(self.texts)}")
        self.texts.append(text)


def style() -> AbstractContextManager[None]:
    """The context in which a picture is drawn and written."""
    return rc_context(_STYLE)


def write(figure: Figure, label: str, hints: Hints | None = None) -> Markup:
    """A figure as an SVG element of a page; call inside `style()`.

    Args:
        figure: drawn.
        label: for readers who do not see it.
        hints: of its marks.
    """
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue(), label, hints.texts if hints else [])


@cache
def width_of(text: str, size: float = FONT_SIZE) -> float:
    """How wide a text is in inches, without drawing it."""
    if not text:
        return 0.0
    path = TextPath((0, 0), text, size=size, prop=FontProperties(family=["DejaVu Sans"]), usetex=False)
    return float(path.get_extents().width) / 72


def legend_above(axes: Axes, handles: Sequence[Artist], labels: Sequence[str], columns: int) -> None:
    """A legend above the axes, at the left, in rows of `columns`."""
    # Matplotlib fills columns first; readers read rows.
    order = [i for column in range(columns) for i in range(column, len(labels), columns)]
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        handlelength=1.1,
        handleheight=1.1,
        columnspacing=1.3,
        borderaxespad=0.3,
        borderpad=0,
    )


def _inline(text: str, label: str, hints: Sequence[str]) -> Markup:
    """The element alone, without ids that several pictures on a page would share, and the page's colors and font."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(
        rf'<g id="{_HINT}(\d+)"([^>]*)>', lambda m: f"<g{m[2]}><title>{escape(hints[int(m[1])])}</title>", text
    )
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = text.replace("'DejaVu Sans', sans-serif", "sans-serif")
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r"<[^>]*>", lambda tag: _LONG_NUMBER.sub(r"\1", tag[0]), text)
    for name, stand_in in _VARIABLES.items():
        text = text.replace(stand_in, f"var(--{name})")
    head = re.match(r"<svg[^>]*>", text)
    view = re.search(r'viewBox="([^"]*)"', text)
    assert head is not None, "matplotlib writes an svg element"
    assert view is not None, "the svg element has a viewBox"
    width, height = (float(number) for number in view[1].split()[2:])
    opening = (
        f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="{view[1]}" '
        f'width="{width * 4 / 3:.0f}" height="{height * 4 / 3:.0f}">'
    )
    return Markup(re.sub(r"\s*\n\s*", "\n", opening + text[head.end() :]))
