"""Tables of phenotypes, diseases and covariates (CSV or Parquet), and how they are joined to the subjects of a source.

One row per subject. The column of subjects is called ``subject``, those of labels as `kmtr.types.LABELS`; a map such as
``subject=eid lvedv_ml=f24100_2_0`` names others. Columns that are no labels are left alone, except those that differ
from a label in upper case or punctuation only, which are refused as a slip. A cell that is empty, or one of `EMPTY`, is
unknown.

A number outside `PLAUSIBLE` is refused, and where most of a column is, so is its unit: an ejection fraction of 0.61
instead of 61, litres instead of millilitres. Messages name rows and columns and never a cell: it may be a person's.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import math
import posixpath
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from kmtr.data.dataset import storage
from kmtr.types import COVARIATES, DISEASES, LABELS, PHENOTYPES, InputError

SUBJECT = "subject"

EMPTY = ("", "na", "n/a", "nan", "null", "none", ".")
"""Cells that say nothing, in any case."""

_YES_NO = (0.0, 1.0)
PLAUSIBLE: dict[str, tuple[float, float]] = {
    "lvedv_ml": (20, 800),
    "lvesv_ml": (5, 700),
    "lvsv_ml": (5, 300),
    "lvef_pct": (3, 95),
    "lvco_l_min": (0.5, 20),
    "lvm_g": (20, 600),
    "rvedv_ml": (20, 800),
    "rvesv_ml": (5, 700),
    "rvsv_ml": (5, 300),
    "rvef_pct": (3, 95),
    "lav_max_ml": (5, 500),
    "lav_min_ml": (1, 450),
    "lasv_ml": (1, 200),
    "laef_pct": (2, 95),
    "rav_max_ml": (5, 500),
    "rav_min_ml": (1, 450),
    "rasv_ml": (1, 200),
    "raef_pct": (2, 95),
    "wall_thickness_mm": (2.5, 40),
    "wall_thickness_max_mm": (2.5, 60),
    "thickening_min_pct": (-100, 300),
    "gcs_pct": (-60, 15),
    **dict.fromkeys(DISEASES, _YES_NO),
    "male": _YES_NO,
    "age_y": (0, 120),
    "bsa_m2": (0.5, 4),
    "heart_rate_bpm": (20, 250),
}
"""Label -> least and greatest value of a living heart, wide enough for disease; in the label's unit."""


def read_table(path: str, columns: str = "") -> dict[str, dict[str, float]]:
    """Subject, by the name that the source gives it -> its known labels.

    Args:
        path: ``.csv`` or ``.parquet``, local or a URI.
        columns: where names differ, ``"subject=eid lvedv_ml=f24100_2_0 ..."``.

    Raises:
        InputError: no such file or column, an unknown label, a subject without a name or twice, a cell that is no
            number or no plausible one.
    """
    where = f"labels table {storage.shown(path)}"
    of = _columns(columns)
    table = _load(path, where, of)
    subjects = _subjects(table.column(of[SUBJECT]), where, of[SUBJECT])
    labels = {
        label: _numbers(table.column(column), where, label, column) for label, column in of.items() if label != SUBJECT
    }
    return {
        subject: {label: values[n] for label, values in labels.items() if not math.isnan(values[n])}
        for n, subject in enumerate(subjects)
    }


def join(subjects: Iterable[str], table: Mapping[str, dict[str, float]]) -> list[dict[str, float]]:
    """The labels of each subject of a source, in order; empty for one that the table doesn't have.

    Raises:
        InputError: the table has none of them; what their names look like is shown with 9 for digits and a for letters.
    """
    names = list(subjects)
    if names and not any(name in table for name in names):
        shape = _shape(names[0]), _shape(next(iter(table))) if table else "nothing"
        raise InputError(
            f"ingest.labels: none of the source's {len(names)} subjects is in the table: the source's names look like "
            f"{shape[0]}, the table's like {shape[1]}; name the right column: ingest.columns='subject=...'"
        )
    return [table.get(name, {}) for name in names]


def summary(labels: Iterable[Mapping[str, float]]) -> str:
    """How many subjects a table gave labels to, and how many of each label."""
    rows = list(labels)
    counts = {label: n for label in LABELS if (n := sum(label in row for row in rows))}
    known = ", ".join(f"{label} {n}" for label, n in counts.items())
    return f"labels for {sum(map(bool, rows))} of {len(rows)} subjects: {known}"


def digest(labels: Iterable[Mapping[str, float]]) -> str:
    """16 hexadecimal digits that change with any label of any subject."""
    content = repr([sorted(row.items()) for row in labels])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- columns


def _columns(text: str) -> dict[str, str]:
    """Label (or SUBJECT) -> its column as the map says."""
    found: dict[str, str] = {}
    for word in text.split():
        label, equals, column = word.partition("=")
        if not equals or not column:
            raise InputError(f"ingest.columns: expected label=column, got {word!r}")
        if label not in (SUBJECT, *LABELS):
            near = difflib.get_close_matches(label, (SUBJECT, *LABELS), 1)
            raise InputError(
                f"ingest.columns: unknown label {label!r}" + (f", did you mean {near[0]}?" if near else "")
            )
        if label in found:
            raise InputError(f"ingest.columns: {label} is given twice")
        found[label] = column
    return found


def _complete(of: dict[str, str], names: list[str], where: str) -> None:
    """Add to `of` the columns that are called as labels; refuse what is missing, or nearly a label."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None and twice in {*of.values(), *LABELS, SUBJECT}:
        raise InputError(f"{where}: column {twice!r} is there twice")
    for label in (SUBJECT, *LABELS):
        if label in names and label not in of:
            of[label] = label
    for label, column in of.items():
        if column not in names:
            close = difflib.get_close_matches(column, names, 1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise InputError(f"{where}: no column {column!r} for {label}{hint}")
    if SUBJECT not in of:
        raise InputError(f"{where}: no column 'subject'; name it: ingest.columns='subject=...'")
    plain = {_plain(label): label for label in LABELS}
    for name in names:
        meant = plain.get(_plain(name))
        if meant is not None and meant not in of:
            raise InputError(f"{where}: column {name!r} is nearly {meant}: say ingest.columns='{meant}={name}'")
    if len(of) == 1:
        raise InputError(
            f"{where}: no column is called as a label ({', '.join(LABELS[:3])}, ...); say ingest.columns=..."
        )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


# ------------------------------------------------------------------------------------------------------------- cells


def _load(path: str, where: str, of: dict[str, str]) -> pa.Table:
    """The columns that are wanted; completes `of`. Cells of a CSV stay text."""
    store, inside = storage.open_root(path)
    try:
        if not storage.exists(store, inside):
            raise InputError(f"{where}: expected a .csv or .parquet file, found none")
        content = io.BytesIO(storage.read_bytes(store, inside))
        ending = posixpath.splitext(inside)[1].lower()
        if ending == ".parquet":
            file = pa.parquet.ParquetFile(content)
            _complete(of, list(file.schema_arrow.names), where)
            return file.read(columns=sorted(set(of.values())))
        if ending != ".csv":
            raise InputError(f"{where}: expected a .csv or .parquet file, got another ending")
        names = list(pa.csv.open_csv(content).schema.names)
        content.seek(0)
        _complete(of, names, where)
        wanted = sorted(set(of.values()))
        options = pa.csv.ConvertOptions(
            include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=False
        )
        return pa.csv.read_csv(content, convert_options=options)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{where}: cannot be read ({type(error).__name__}); expected a table with a header row"
        ) from None


def _subjects(column: pa.ChunkedArray, where: str, name: str) -> list[str]:
    """Names as text; whole numbers without a decimal point."""
    rows: dict[str, int] = {}
    for row, value in enumerate(column.to_pylist(), 1):
        whole = isinstance(value, float) and value.is_integer()
        subject = "" if value is None else str(int(value) if whole else value).strip()
        if not subject or subject.lower() == "nan":
            raise InputError(f"{where}: {name}: row {row} names no subject")
        if subject in rows:
            raise InputError(f"{where}: {name}: rows {rows[subject]} and {row} are of the same subject; leave one")
        rows[subject] = row
    return list(rows)


def _numbers(column: pa.ChunkedArray, where: str, label: str, name: str) -> list[float]:
    """The numbers of a label, NaN where unknown, all of them plausible."""
    values = [_number(cell, f"{where}: {name}: row {row}") for row, cell in enumerate(column.to_pylist(), 1)]
    low, high = PLAUSIBLE[label]
    outside = [row for row, value in enumerate(values, 1) if not (math.isnan(value) or low <= value <= high)]
    known = sum(not math.isnan(value) for value in values)
    unit = (PHENOTYPES | COVARIATES).get(label, "0 or 1")
    if 2 * len(outside) > known:
        raise InputError(
            f"{where}: {name}: {len(outside)} of {known} values are not within {low:g} to {high:g}, but {label} is in "
            f"{unit}: another unit or sign?"
        )
    if outside:
        rows = ", ".join(map(str, outside[:5])) + (", ..." if len(outside) > 5 else "")
        raise InputError(
            f"{where}: {name}: not within {low:g} to {high:g} ({label} in {unit}) in row {rows}; "
            "correct these cells or leave them empty"
        )
    if (low, high) == _YES_NO and (other := [row for row, value in enumerate(values, 1) if 0 < value < 1]):
        raise InputError(f"{where}: {name}: row {other[0]}: expected 0 or 1 for {label}, got a number between")
    return values


def _number(cell: Any, where: str) -> float:
    if cell is None or (isinstance(cell, str) and cell.strip().lower() in EMPTY):
        return math.nan
    try:
        value = float(cell)
    except (TypeError, ValueError):
        raise InputError(f"{where}: expected a number, or nothing where it is unknown") from None
    if math.isinf(value):
        raise InputError(f"{where}: expected a finite number, or nothing where it is unknown")
    return value


def _shape(name: str) -> str:
    """A name with its digits as 9 and its letters as a."""
    return repr(re.sub(r"[^\W\d_]", "a", re.sub(r"\d", "9", name))[:40])
