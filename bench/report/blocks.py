"""What a page is made of: sections of texts, tables, charts and folds, which the template writes out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from markupsafe import Markup


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        text: shown.
        minor: shown smaller, behind it.
        look: classes: `good`, `bad`, `quiet`, `name`.
        rows: that it spans.
        hint: shown when pointed at.
    """

    text: str
    minor: str = ""
    look: str = ""
    rows: int = 1
    hint: str = ""


@dataclass(frozen=True)
class Column:
    """A column's head; numbers stand to the right."""

    title: str
    is_number: bool = True
    hint: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    look: str = ""
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Table:
    """A table in a container that scrolls. Each list of rows keeps together: cells that span rows are in its first."""

    columns: Sequence[Column]
    bodies: Sequence[Sequence[Sequence[Cell]]]
    caption: str = ""
    note: str = ""
    kind: ClassVar[str] = "table"

    def placed(self) -> list[list[list[tuple[Cell, Column]]]]:
        """Each cell with its column, which cells that span rows above it shift.

        Raises:
            ValueError: a row has too many or too few cells.
        """
        return [self._placed(body) for body in self.bodies]

    def _placed(self, body: Sequence[Sequence[Cell]]) -> list[list[tuple[Cell, Column]]]:
        taken = [0] * len(self.columns)
        found = []
        for row in body:
            free = [index for index, left in enumerate(taken) if left == 0]
            taken = [max(0, left - 1) for left in taken]
            for index, cell in zip(free, row, strict=True):
                taken[index] = cell.rows - 1
            found.append([(cell, self.columns[index]) for index, cell in zip(free, row, strict=True)])
        return found


@dataclass(frozen=True)
class Chart:
    """A picture as inline SVG, safe to write out as it is."""

    svg: Markup
    caption: str
    note: str = ""
    kind: ClassVar[str] = "chart"


@dataclass(frozen=True)
class Fold:
    """Blocks behind a line that opens them; paper shows them open."""

    title: str
    blocks: Sequence["Block"]
    kind: ClassVar[str] = "fold"


Block = Text | Table | Chart | Fold


@dataclass(frozen=True)
class Section:
    """A part of the page with a line in the table of contents.

    Args:
        key: of its link, unique on the page.
        title: its headline.
        blocks: its contents.
        sections: below it.
    """

    key: str
    title: str
    blocks: Sequence[Block]
    sections: Sequence["Section"] = field(default_factory=tuple)


@dataclass(frozen=True)
class Key:
    """A number of the headline.

    Args:
        title: what it is.
        value: large.
        detail: one line about it.
        is_measured: otherwise it is quiet.
    """

    title: str
    value: str
    detail: str
    is_measured: bool = True


def rows(*lines: Sequence[Any]) -> list[list[list[Cell]]]:
    """Plain rows, of cells and texts, as the bodies of a table: each by itself."""
    return [[[cell if isinstance(cell, Cell) else Cell(cell) for cell in line]] for line in lines]


def names(*titles: str) -> list[Column]:
    """Columns of words."""
    return [Column(title, is_number=False) for title in titles]


def numbers(*titles: str) -> list[Column]:
    """Columns of numbers."""
    return [Column(title) for title in titles]
