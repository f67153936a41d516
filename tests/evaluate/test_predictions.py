"""The file of predictions: what it keeps, what it refuses, and that no row is there twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kmtr.evaluate import predictions
from kmtr.evaluate.predictions import MEAN, RIDGE, SCHEMA, HeldOut, Name, append, joined, read, rows, write
from kmtr.types import InputError

HELD_OUT = HeldOut(("p-a", "p-b", "p-c"), ("lvedv_ml", "lvm_g"), np.array([[150.0, 90.0], [120.0, np.nan], [1.0, 2.0]]))
VALUES = np.array([[151.0, 91.0], [119.0, 80.0], [np.nan, 3.0]])


def some(name: Name = RIDGE, acceleration: int = 4, seed: int = 0, labels: int = 100) -> pa.Table:
    return rows(name, HELD_OUT, VALUES, acceleration=acceleration, seed=seed, labels=labels)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "predictions.parquet"
    table = rows(
        RIDGE, HELD_OUT, VALUES, acceleration=4, seed=1, labels=7, true_acceleration=np.array([3.5, np.nan, 3.0])
    )
    write(path, table)
    found = read(path)
    assert found == table
    assert found.schema.equals(SCHEMA)
    assert [tuple(row.values()) for row in found.to_pylist()] == [
        ("p-a", 4, 3.5, "ridge", "low-res image", 1, 7, "lvedv_ml", 150.0, 151.0),
        ("p-b", 4, None, "ridge", "low-res image", 1, 7, "lvedv_ml", 120.0, 119.0),
        ("p-a", 4, 3.5, "ridge", "low-res image", 1, 7, "lvm_g", 90.0, 91.0),
        ("p-b", 4, None, "ridge", "low-res image", 1, 7, "lvm_g", None, 80.0),
        ("p-c", 4, 3.0, "ridge", "low-res image", 1, 7, "lvm_g", 2.0, 3.0),
    ]
    assert list(path.parent.iterdir()) == [path], "nothing temporary is left"


def test_rows_are_added_and_a_key_that_is_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    append(path, some())
    others = [some(MEAN), some(acceleration=8), some(seed=1), some(labels=200), some(Name("ridge", "central lines"))]
    for other in others:
        append(path, other)
    assert read(path) == joined([some(), *others])
    with pytest.raises(InputError, match="each row once, got 2 of one subject with acceleration 4, system ridge"):
        append(path, some())
    assert read(path) == joined([some(), *others]), "a refused row changes nothing"
    with pytest.raises(InputError, match="each row once") as error:
        write(path, joined([some(), some()]))
    assert "p-a" not in str(error.value)
    assert "\n" not in str(error.value)


def _as(**changes: pa.Array) -> pa.Table:
    table = some()
    for name, column in changes.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (some().replace_schema_metadata({b"kmtr.predictions": b"9"}), "expected format 1, got 9"),
        (some().replace_schema_metadata({}), "expected format 1, got none"),
        (some().drop_columns(["truth"]), "expected the column truth once, got subject, acceleration"),
        (some().append_column("age", pa.array([1] * 5)), "expected no column 'age'"),
        (some().append_column("value", pa.array([1.0] * 5)), "expected the column value once"),
        (_as(seed=pa.array(["0"] * 5)), "expected seed as int64, got string"),
        (_as(value=pa.array([1.0, None, 1.0, 1.0, 1.0])), "expected a value in every row"),
        (pa.concat_tables([some(), some()]), "expected each row once"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path, table: pa.Table, message: str) -> None:
    path = tmp_path / "predictions.parquet"
    pq.write_table(table, path)
    with pytest.raises(InputError, match=message) as error:
        read(path)
    assert str(error.value).startswith("predictions: expected")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_file_of_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    with pytest.raises(InputError, match="expected a file, got none"):
        read(path)
    write(path, some())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="expected a Parquet file"):
        read(path)


def test_the_input_is_told_where_the_system_leaves_it_open() -> None:
    names = (predictions.TRAINED, predictions.UNTRAINED, predictions.RIDGE, predictions.CENTRAL, predictions.MEAN)
    assert [name.title for name in names] == [
        "k-MTR encoder",
        "untrained encoder",
        "ridge on low-res image",
        "ridge on central lines",
        "mean",
    ]
    assert predictions.MASK_RIDGE.title == "ridge on temporally shared image"
