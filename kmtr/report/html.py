"""One self-contained HTML file per report, and the same tables as plain text for a terminal."""

from __future__ import annotations

import base64
import io
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kmtr.files import write_atomic
from kmtr.types import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | int | float | None
DPI = 144
"""Dots per inch of the embedded pictures: sharp on a screen of high density and on paper."""

_LEADING_NUMBER = re.compile(r"[-+−]?\d+(\.\d+)?(e[-+]?\d+)?")


@dataclass(frozen=True)
class Table:
    """Rows under named columns.

    Attributes:
        caption: one sentence above the table.
        columns: names; a unit belongs in the name.
        rows: cells. A column goes to the right where all its cells are numbers or texts that begin with one, as in
            ``0.81 [0.78, 0.84]``; None and NaN are missing and shown as a dash.
        note: below the table; empty: nothing.
        best: pairs of column and "max" or "min": its best numbers are set bold (a star in a terminal).
        digits: digits after the point of floats.
        strong: (row, column) of other cells that are set so.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    best: tuple[tuple[str, Literal["max", "min"]], ...] = ()
    digits: int = 3
    strong: frozenset[tuple[int, int]] = frozenset()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise InputError(f"table {self.caption!r}: expected {len(self.columns)} cells a row, got {len(row)}")
        for name, _ in self.best:
            if name not in self.columns:
                raise InputError(f"table {self.caption!r}: best of {name!r}, expected one of {', '.join(self.columns)}")


def text_table(table: Table) -> str:
    """The table for a terminal: caption, aligned columns, a star behind the best values, note; no final line end."""
    best, right = _best_cells(table), _right_columns(table)
    starred = {table.columns[j] for _, j in table.strong} | {*dict(table.best)}
    room = [" " if name in starred else "" for name in table.columns]  # for the star, to keep digits aligned
    body = [
        [text + ("*" if (i, j) in best else room[j]) for j, text in enumerate(row)]
        for i, row in enumerate(_texts(table))
    ]
    head = [name + blank for name, blank in zip(table.columns, room, strict=True)]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]

    def line(row: Sequence[str]) -> str:
        aligned = [text.rjust(w) if r else text.ljust(w) for text, w, r in zip(row, widths, right, strict=True)]
        return "  ".join(aligned).rstrip()

    lines = [table.caption, line(head), line(["-" * width for width in widths]), *map(line, body)]
    return "\n".join([*lines, table.note] if table.note else lines)


def markdown_table(table: Table) -> str:
    """The table in Markdown: caption, rows, note; no final line end."""
    aligned = ["---:" if right else "---" for right in _right_columns(table)]
    rows = [table.columns, aligned, *_texts(table)]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n\n".join(filter(None, (table.caption, body, table.note)))


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: str,
    tables: Sequence[Table],
    figures: Sequence[tuple[str, Figure | bytes]],
    footer: str = "",
) -> Path:
    """Writes one HTML file that needs nothing beside it: pictures inside, light and dark, fit for printing.

    Args:
        path: of the file; its folder is made, an older file replaced at once (never half written).
        summary: plain text; an empty line begins a paragraph.
        figures: pairs of caption and figure, or a PNG's bytes.
        footer: plain text: how the numbers were made (run, commit, versions, date).

    Returns:
        The path written.
    """
    path = Path(path)
    numbers = [_html_table(table, i) for i, table in enumerate(tables, 1)]
    pictures = [_html_figure(caption, figure, i) for i, (caption, figure) in enumerate(figures, 1)]
    body = "\n".join(
        [
            f"<header><h1>{escape(title)}</h1>",
            *(f"<p>{escape(' '.join(p.split()))}</p>" for p in re.split(r"\n\s*\n", summary.strip()) if p),
            "</header>",
            *numbers,
            *pictures,
            f"<footer>{escape(footer)}</footer>" if footer else "",
        ]
    )
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page)
    return path


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure as PNG, without the time and the program that made it: equal figures give equal bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)  # no pyplot: no window system, no figure kept alive in a global list
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _html_table(table: Table, number: int) -> str:
    best, right = _best_cells(table), _right_columns(table)

    def cell(tag: str, text: str, j: int, strong: bool = False) -> str:
        text = escape(text)
        return f"<{tag}{' class=n' if right[j] else ''}>{f'<b>{text}</b>' if strong else text}</{tag}>"

    head = "".join(cell("th", name, j) for j, name in enumerate(table.columns))
    body = "\n".join(
        "<tr>" + "".join(cell("td", text, j, (i, j) in best) for j, text in enumerate(row)) + "</tr>"
        for i, row in enumerate(_texts(table))
    )
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    return (
        f"<section><h2><span>Table {number}</span> {escape(table.caption)}</h2><div class=wide><table>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>{note}</section>"
    )


def _html_figure(caption: str, figure: Figure | bytes, number: int) -> str:
    picture = figure if isinstance(figure, bytes) else png(figure)
    width, height = (round(n * 96 / DPI) for n in struct.unpack(">II", picture[16:24]))  # of PNG's first chunk
    data = base64.b64encode(picture).decode()
    return (
        f'<figure><img alt="{escape(caption, quote=True)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{data}">'
        f"<figcaption><span>Figure {number}</span> {escape(caption)}</figcaption></figure>"
    )


def _texts(table: Table) -> list[list[str]]:
    return [[_text(cell, table.digits) for cell in row] for row in table.rows]


def _text(cell: Cell, digits: int) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    if isinstance(cell, float):
        return f"{cell:.{digits}f}".replace("-", "−")
    return f"{cell:,}" if isinstance(cell, int) and abs(cell) >= 10_000 else str(cell)


def _number(cell: Cell) -> float | None:
    """The number that a cell is, or begins with; None: missing or text."""
    if isinstance(cell, str):
        match = _LEADING_NUMBER.match(cell)
        return float(match.group().replace("−", "-")) if match else None
    return None if cell is None or math.isnan(cell) else float(cell)


def _right_columns(table: Table) -> list[bool]:
    columns = [[cell for cell in column if cell not in (None, "")] for column in zip(*table.rows, strict=True)]
    if not columns:
        return [False] * len(table.columns)
    return [bool(c) and all(not isinstance(x, str) or x == "–" or _number(x) is not None for x in c) for c in columns]


def _best_cells(table: Table) -> set[tuple[int, int]]:
    """(row, column) of the best values and of `strong`; what is shown as the same number is equally good."""
    found = {*table.strong}
    texts = _texts(table)
    for name, direction in table.best:
        j = table.columns.index(name)
        numbers = {i: n for i, row in enumerate(table.rows) if (n := _number(row[j])) is not None}
        if numbers:
            winner = (max if direction == "max" else min)(numbers, key=numbers.__getitem__)
            shown = texts[winner][j].partition(" ")[0]
            found |= {(i, j) for i in numbers if texts[i][j].partition(" ")[0] == shown}
    return found


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --line: #d5dae0; --page: #ffffff; --tint: #f4f6f8;
  --accent: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa4b0; --line: #363d46; --page: #14181d;
  --tint: #1c2127; --accent: #6cb2f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.5rem 3rem; }
header { border-bottom: 2px solid var(--ink); padding-bottom: .9rem; margin-bottom: 2rem; }
header p { max-width: 46rem; margin: .5rem 0 0; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .6rem; font-weight: 650; letter-spacing: -.01em; }
h2, figcaption { font-size: .95rem; font-weight: 400; line-height: 1.45; max-width: 54rem; }
h2 { margin: 0 0 .5rem; }
h2 span, figcaption span { font-weight: 650; color: var(--accent); margin-right: .35em; }
section, figure { margin: 0 0 2.2rem; break-inside: avoid; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums;
  border-top: 1.5px solid var(--ink); border-bottom: 1.5px solid var(--ink); }
th, td { padding: .32rem .9rem; text-align: left; white-space: nowrap; }
th:first-child, td:first-child { padding-left: .3rem; }
th { font-weight: 600; border-bottom: 1px solid var(--ink); vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--tint); }
.n { text-align: right; }
.note { color: var(--soft); font-size: .85rem; margin: .45rem 0 0; max-width: 54rem; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 3px; background: #fff; }
figcaption { margin-top: .55rem; }
footer { border-top: 1px solid var(--line); color: var(--soft); font-size: .82rem; padding-top: .8rem;
  overflow-wrap: anywhere; white-space: pre-line; }
@media (prefers-color-scheme: dark) { figure img { padding: .4rem; } }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --tint: #f4f4f4; --accent: #000; }
  main { max-width: none; padding: 0; } body { font-size: 10.5pt; } @page { margin: 16mm; } }
"""
