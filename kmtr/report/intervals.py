"""Tables of numbers with their intervals: one content for HTML, CSV and JSON."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from kmtr.report.html import Cell, Table
from kmtr.types import InputError


class Interval(NamedTuple):
    """A number and the ends of its 95 % interval; NaN: not defined."""

    value: float
    low: float
    high: float


Value = Cell | Interval


class Column(NamedTuple):
    """Name of a column, with its unit, and how its numbers are shown.

    Attributes:
        signed: numbers carry a + or - (differences).
    """

    name: str
    digits: int = 3
    signed: bool = False


@dataclass(frozen=True)
class IntervalTable:
    """Rows under named columns, numbers as they are.

    Attributes:
        name: of its file, without ending.
        caption: one sentence.
        strong: (row, column) of cells that are set bold, in a terminal with a star.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    note: str = ""
    strong: frozenset[tuple[int, int]] = frozenset()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise InputError(f"table {self.name}: expected {len(self.columns)} cells a row, got {len(row)}")

    def table(self) -> Table:
        """The table to be read: ``0.81 [0.78, 0.84]`` for a number with its interval."""
        rows = tuple(
            tuple(_shown(cell, column) for cell, column in zip(row, self.columns, strict=True)) for row in self.rows
        )
        return Table(self.caption, tuple(column.name for column in self.columns), rows, self.note, strong=self.strong)

    def csv(self) -> str:
        """The table as CSV, in full precision: a column with intervals is three, ``x``, ``x low`` and ``x high``."""
        wide = [any(isinstance(row[j], Interval) for row in self.rows) for j in range(len(self.columns))]
        sink = io.StringIO()
        out = csv.writer(sink, lineterminator="\n")
        names = [[c.name, f"{c.name} low", f"{c.name} high"] if w else [c.name] for c, w in self._with(wide)]
        out.writerow([name for group in names for name in group])
        for row in self.rows:
            out.writerow([value for cell, w in zip(row, wide, strict=True) for value in _plain(cell, w)])
        return sink.getvalue()

    def json(self) -> dict[str, Any]:
        """The table for JSON; a number with its interval is ``{"value", "low", "high"}``, NaN is null."""
        names = [column.name for column in self.columns]
        rows = [{name: _jsonable(cell) for name, cell in zip(names, row, strict=True)} for row in self.rows]
        return {"name": self.name, "caption": self.caption, "note": self.note, "columns": names, "rows": rows}

    def _with(self, wide: list[bool]) -> list[tuple[Column, bool]]:
        return list(zip(self.columns, wide, strict=True))


def text_of(value: Interval, digits: int = 2, signed: bool = False) -> str:
    """``0.81 [0.78, 0.84]``; a dash where the number is not defined, the number alone where its interval is not."""
    if math.isnan(value.value):
        return "–"
    text = _number(value.value, digits, signed)
    if math.isnan(value.low):
        return text
    return f"{text} [{_number(value.low, digits, signed)}, {_number(value.high, digits, signed)}]"


def _number(value: float, digits: int, signed: bool) -> str:
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def _shown(cell: Value, column: Column) -> Cell:
    if isinstance(cell, Interval):
        return text_of(cell, column.digits, column.signed)
    if isinstance(cell, float) and not math.isnan(cell):
        return _number(cell, column.digits, column.signed)
    return cell


def _plain(cell: Value, wide: bool) -> list[Cell]:
    cells: list[Cell] = list(cell) if isinstance(cell, Interval) else [cell, *([None, None] if wide else [])]
    return ["" if value is None or (isinstance(value, float) and math.isnan(value)) else value for value in cells]


def _jsonable(cell: Value) -> Any:
    if isinstance(cell, Interval):
        return {name: _jsonable(value) for name, value in cell._asdict().items()}
    return None if isinstance(cell, float) and math.isnan(cell) else cell
