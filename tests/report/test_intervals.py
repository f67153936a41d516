"""Tables of numbers with their intervals: the same content to be read, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json

import pytest

from kmtr.report.intervals import Column, Interval, IntervalTable, text_of
from kmtr.types import InputError

NAN = float("nan")
TABLE = IntervalTable(
    "errors",
    "Errors",
    (Column("R"), Column("system"), Column("MAE (mL)", 1), Column("bias (mL)", 1, signed=True)),
    (
        (4, "one", Interval(10.123, 9.5, 11.25), 0.26),
        (8, "two", Interval(NAN, NAN, NAN), NAN),
        (8, "three", None, -1.0),
    ),
    "A note.",
)


def test_it_is_read_with_intervals_in_the_digits_of_each_column() -> None:
    table = TABLE.table()
    assert table.columns == ("R", "system", "MAE (mL)", "bias (mL)")
    assert table.rows[0] == (4, "one", "10.1 [9.5, 11.2]", "+0.3")
    assert table.rows[1][2] == "–"
    assert table.rows[2][2:] == (None, "−1.0")
    assert table.note == "A note."


def test_csv_holds_numbers_alone_in_full_precision() -> None:
    rows = list(csv.reader(io.StringIO(TABLE.csv())))
    assert rows[0] == ["R", "system", "MAE (mL)", "MAE (mL) low", "MAE (mL) high", "bias (mL)"]
    assert rows[1] == ["4", "one", "10.123", "9.5", "11.25", "0.26"]
    assert rows[2] == ["8", "two", "", "", "", ""]
    assert rows[3] == ["8", "three", "", "", "", "-1.0"]


def test_json_says_null_where_a_number_is_not_defined() -> None:
    said = json.loads(json.dumps(TABLE.json(), allow_nan=False))
    assert said["rows"][0]["MAE (mL)"] == {"value": 10.123, "low": 9.5, "high": 11.25}
    assert said["rows"][1] == {"R": 8, "system": "two", "MAE (mL)": dict.fromkeys(Interval._fields), "bias (mL)": None}


def test_a_number_without_an_interval_stands_alone() -> None:
    assert text_of(Interval(0.5, NAN, NAN)) == "0.50"
    assert text_of(Interval(0.5, 0.4, 0.6), signed=True) == "+0.50 [+0.40, +0.60]"


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(InputError, match="table short: expected 1 cells a row, got 2"):
        IntervalTable("short", "", (Column("R"),), ((4, 5),))
