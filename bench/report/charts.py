"""The pictures: speed-ups as bars, parts as stacked bars, kernels under their ceilings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.report import svg
from bench.report.data import Ratio
from bench.report.numbers import TIMES, UNITS, duration, factor, plain, rate, unit

_INCHES = 9.6
_MARKERS = "os^DvP*X<>ph"
# Ticks of an axis of ratios, by how far apart its ends may be.
_TICKS = {
    3: (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 2.5),
    20: (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16),
    math.inf: (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32, 64, 128),
}


@dataclass(frozen=True)
class Bar:
    """A speed-up.

    Args:
        gain: with its spread; None is shown as an empty row with `why`.
        cold: the same out of the cache.
        is_chosen: whether the automatic choice takes this backend.
        hint: shown when pointed at.
        why: shown in place of a bar.
    """

    gain: Ratio | None
    cold: Ratio | None
    is_chosen: bool
    hint: str
    why: str = ""


@dataclass(frozen=True)
class Stack:
    """Parts of a time, in microseconds; `total` is what was timed as a whole, None where it was not."""

    label: str
    parts: dict[str, float]
    total: float | None


@dataclass(frozen=True)
class Point:
    """A case under the ceilings: operations a byte, and operations a second of eager and of ours."""

    kind: str
    intensity: float
    eager: float | None
    ours: float | None
    is_loss: bool
    hint: str


def speedups(rows: Sequence[str], columns: Mapping[str, Sequence[Bar | None]], label: str) -> Markup:
    """Horizontal bars from 1 to the right where ours is faster, to the left where it is slower, on a logarithmic axis.

    Args:
        rows: their names.
        columns: by title, a bar for each row; None where there is no such case.
        label: of the picture.
    """
    with svg.style():
        margin = 0.12 + max(svg.width_of(row) for row in rows)
        height = 0.62 + 0.235 * len(rows)
        figure = Figure(figsize=(_INCHES, height))
        grid = figure.add_gridspec(
            1,
            len(columns),
            left=margin / _INCHES,
            right=1 - 0.06 / _INCHES,
            top=1 - 0.27 / height,
            bottom=0.3 / height,
            wspace=0.07,
        )
        hints = svg.Hints()
        low, high = _range([bar for of in columns.values() for bar in of if bar is not None])
        for index, (title, bars) in enumerate(columns.items()):
            axes = figure.add_subplot(grid[0, index])
            axes.set_title(title, pad=5)
            axes.set_xscale("log")
            axes.set_xlim(low, high)
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_yticks(range(len(rows)), rows if index == 0 else [""] * len(rows))
            _ratio_axis(axes, low, high)
            for row, bar in enumerate(bars):
                if bar is not None:
                    _bar(axes, row, bar, hints)
        return svg.write(figure, label, hints)


def stacks(bars: Sequence[Stack], label: str) -> Markup:
    """Horizontal bars of parts; the whole, timed apart, is written behind each."""
    names = list(dict.fromkeys(name for bar in bars for name in bar.parts))
    with svg.style():
        margin = 0.12 + max(svg.width_of(bar.label) for bar in bars)
        widest = max(sum(bar.parts.values()) for bar in bars)
        widths = [svg.width_of(name) + 0.45 for name in names]
        room = _INCHES - margin
        columns = len(names) if sum(widths) < room else max(1, int(room / max(widths)))
        above = 0.12 + 0.2 * -(-len(names) // columns)
        height = above + 0.36 + 0.42 * len(bars)
        figure = Figure(figsize=(_INCHES, height))
        area = (margin / _INCHES, 0.32 / height, 1 - (margin + 0.1) / _INCHES, 1 - (above + 0.32) / height)
        axes = figure.add_axes(area)
        hints = svg.Hints()
        for row, bar in enumerate(bars):
            left = 0.0
            for name, value in bar.parts.items():
                color = _color(names.index(name))
                hint = f"{bar.label}, {name}: {duration(value)}"
                _segment(axes, row, left, value, widest, color, hint, hints)
                left += value
            axes.text(left + 0.008 * widest, row, duration(bar.total), va="center", fontweight="bold")
        axes.set_xlim(0, 1.13 * widest)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        scale = unit(widest)
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value / UNITS[scale]:g} {scale}" if value else "0")
        )
        axes.grid(axis="x")
        handles = [Patch(facecolor=_color(index)) for index in range(len(names))]
        svg.legend_above(axes, handles, names, columns)
        return svg.write(figure, label, hints)


def roofline(points: Sequence[Point], bandwidth: float | None, product: float | None, label: str) -> Markup:
    """Operations a second over operations a byte, both logarithmic, under the ceilings.

    Args:
        points: the cases; eager hollow, ours filled, joined by a line.
        bandwidth: bytes a second of a copy; None where it was not measured.
        product: operations a second of a matrix product; None where it was not measured.
        label: of the picture.
    """
    with svg.style():
        figure = Figure(figsize=(_INCHES, 4.9))
        axes = figure.add_axes((0.075, 0.1, 0.665, 0.87))
        axes.set_xscale("log")
        axes.set_yscale("log")
        hints = svg.Hints()
        low, high = min(p.intensity for p in points) / 2, max(p.intensity for p in points) * 2
        if bandwidth and product:
            low, high = min(low, product / bandwidth / 4), max(high, product / bandwidth * 4)
        axes.set_xlim(low, high)
        kinds = list(dict.fromkeys(point.kind for point in points))
        for point in points:
            _point(axes, point, _MARKERS[kinds.index(point.kind) % len(_MARKERS)], hints)
        _roofline_axes(axes)
        _ceilings(axes, low, high, bandwidth, product)
        kind_handles: list[Artist] = [
            Line2D([], [], linestyle="", marker=_MARKERS[i % len(_MARKERS)], color=svg.SOFT) for i in range(len(kinds))
        ]
        side_handles: list[Artist] = [
            _mark(svg.RIVAL, filled=False),
            _mark(svg.OURS),
            *([_mark(svg.LOSS)] if any(point.is_loss for point in points) else []),
        ]
        side_names = ["eager", "ours", "ours, slower than eager"][: len(side_handles)]
        axes.legend(
            [*side_handles, *kind_handles],
            [*side_names, *kinds],
            loc="upper left",
            bbox_to_anchor=(1.02, 1.0),
            borderaxespad=0,
            handletextpad=0.4,
        )
        return svg.write(figure, label, hints)


def _bar(axes: Axes, row: int, bar: Bar, hints: svg.Hints) -> None:
    if bar.gain is None:
        axes.text(1.02, row, bar.why, va="center", color=svg.SOFT, fontstyle="italic", clip_on=True)
        return
    gain = bar.gain
    color = svg.SOFT if not bar.is_chosen else svg.OURS if gain.value >= 1 else svg.LOSS
    look: dict[str, Any] = (
        {"color": color} if bar.is_chosen else {"facecolor": "none", "edgecolor": color, "hatch": "////"}
    )
    container = axes.barh(row, gain.value - 1, left=1, height=0.62, linewidth=0.8, **look)
    hints.give(container[0], bar.hint)
    axes.plot([gain.low, gain.high], [row, row], color=svg.INK, linewidth=1, solid_capstyle="butt")
    for end in (gain.low, gain.high):
        axes.plot([end, end], [row - 0.14, row + 0.14], color=svg.INK, linewidth=1, solid_capstyle="butt")
    ends = [gain.high, 1.0]
    if bar.cold is not None:
        edge = svg.LOSS if bar.is_chosen and bar.cold.value < 1 else svg.INK
        (mark,) = axes.plot([bar.cold.value], [row], "o", markersize=4.6, mfc=svg.PAGE, mec=edge, mew=1, zorder=4)
        hints.give(mark, f"{bar.hint}; out of the cache {factor(bar.cold.value)}")
        ends.append(bar.cold.value)
    weight = "bold" if bar.is_chosen and gain.value < 1 else "normal"
    text_color = svg.LOSS if weight == "bold" else svg.INK if bar.is_chosen else svg.SOFT
    axes.annotate(
        factor(gain.value),
        (max(ends), row),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=text_color,
        fontweight=weight,
    )


def _range(bars: Sequence[Bar]) -> tuple[float, float]:
    """Ends of the axis of ratios, with space for what is written behind the bars."""
    gains = [gain for bar in bars for gain in (bar.gain, bar.cold) if gain is not None]
    low = min([0.8, *(gain.low for gain in gains)])
    high = max([1.5, *(gain.high for gain in gains)])
    return low / 1.08, high * (high / low) ** 0.24


def _ratio_axis(axes: Axes, low: float, high: float) -> None:
    choice = next(ticks for limit, ticks in _TICKS.items() if high / low < limit)
    ticks = [tick for tick in choice if low <= tick <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{TIMES}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x")
    axes.axvline(1, color=svg.INK, linewidth=1, zorder=1.5)
    axes.spines["left"].set_visible(False)


def _segment(
    axes: Axes, row: int, left: float, value: float, widest: float, color: str, hint: str, hints: svg.Hints
) -> None:
    (patch,) = axes.barh(row, value, left=left, height=0.66, color=color, edgecolor=svg.PAGE, linewidth=1)
    hints.give(patch, hint)
    text = duration(value)
    if value / widest * 6.5 > svg.width_of(text) + 0.08:
        light = color in ("#0072b2", "#009e73", "#d55e00")
        axes.text(left + value / 2, row, text, ha="center", va="center", color="#ffffff" if light else "#1b1b1b")


def _color(index: int) -> str:
    return svg.AREAS[index % len(svg.AREAS)]


def _ceilings(axes: Axes, low: float, high: float, bandwidth: float | None, product: float | None) -> None:
    """Lines of what the machine reached, with space above them; the axes' other limits are set."""
    ridge = product / bandwidth if product and bandwidth else None
    bottom, top = axes.get_ylim()
    if bandwidth:
        end = ridge or high
        bottom, top = min(bottom, low * bandwidth), max(top, 1.9 * end * bandwidth)
    if product:
        top = max(top, 1.9 * product)
    axes.set_ylim(bottom, top)
    if bandwidth:
        axes.plot([low, end], [low * bandwidth, end * bandwidth], color=svg.INK, linewidth=1.4)
        (x0, y0), (x1, y1) = axes.transData.transform([(low, low * bandwidth), (end, end * bandwidth)])
        _write_along(
            axes, f"copy {rate(bandwidth, 'B/s')}", (low, low * bandwidth), math.atan2(y1 - y0, x1 - x0), "left"
        )
    if product:
        axes.plot([ridge or low, high], [product, product], color=svg.INK, linewidth=1.4)
        _write_along(axes, f"product {rate(product, 'FLOP/s')}", (high, product), 0.0, "right")


def _write_along(axes: Axes, text: str, end: tuple[float, float], angle: float, side: str) -> None:
    """A text above a line, from one of its ends."""
    along, above = (10 if side == "left" else -4), 5
    offset = (along * math.cos(angle) - above * math.sin(angle), along * math.sin(angle) + above * math.cos(angle))
    axes.annotate(
        text,
        end,
        xytext=offset,
        textcoords="offset points",
        rotation=math.degrees(angle),
        rotation_mode="anchor",
        ha=side,
    )


def _point(axes: Axes, point: Point, marker: str, hints: svg.Hints) -> None:
    color = svg.LOSS if point.is_loss else svg.OURS
    if point.eager and point.ours:
        axes.plot([point.intensity] * 2, [point.eager, point.ours], color=color, linewidth=0.7, alpha=0.6)
    sides = ((point.eager, "eager", svg.RIVAL, "none"), (point.ours, "ours", color, color))
    for value, side, edge, face in sides:
        if value:
            (mark,) = axes.plot([point.intensity], [value], marker, markersize=5.4, mec=edge, mfc=face, mew=1)
            hints.give(mark, f"{point.hint}, {side}: {rate(value, 'FLOP/s')} at {plain(point.intensity)} FLOP/B")


def _roofline_axes(axes: Axes) -> None:
    axes.set_xlabel("FLOP a byte")
    axes.set_ylabel("FLOP/s")
    low, high = axes.get_ylim()
    # At least a decade, so that there are ticks.
    widen = max(1.0, math.sqrt(10 * low / high))
    axes.set_ylim(low / widen / 1.4, high * widen * 1.9)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.tick_params(axis="y", labelcolor=svg.SOFT)
    axes.grid()


def _power(value: float) -> str:
    """`10 G`."""
    scale, prefix = next(((s, p) for s, p in ((1e12, " T"), (1e9, " G"), (1e6, " M")) if value >= s), (1.0, ""))
    return f"{value / scale:g}{prefix}"


def _mark(color: str, *, filled: bool = True) -> Line2D:
    return Line2D([], [], linestyle="", marker="o", mec=color, mfc=color if filled else "none")
