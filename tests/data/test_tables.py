"""Tables of labels: what is read, what is refused, and the join to the subjects of a source."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from kmtr.data.dataset.tables import PLAUSIBLE, digest, join, read_table, summary
from kmtr.types import LABELS, InputError

ROWS = "subject,lvedv_ml,lvef_pct,dcm,male,note\n001,150.5,61,0,1,x\n002,,55.25,1,0,\n003,NA,nan,,,y\n"
READ = {
    "001": {"lvedv_ml": 150.5, "lvef_pct": 61.0, "dcm": 0.0, "male": 1.0},
    "002": {"lvef_pct": 55.25, "dcm": 1.0, "male": 0.0},
    "003": {},
}


def csv(folder: Path, text: str) -> str:
    path = folder / "labels.csv"
    path.write_text(text)
    return str(path)


def test_csv_keeps_names_as_written_and_empty_cells_unknown(tmp_path: Path) -> None:
    assert read_table(csv(tmp_path, ROWS)) == READ


def test_parquet_reads_alike(tmp_path: Path) -> None:
    """Numbers, booleans, text and dictionaries; whole floats as names lose their decimal point."""
    columns = {
        "eid": pa.array([1001.0, 1002.0]),
        "f24100_2_0": pa.array([150, None], pa.int32()),
        "lvef_pct": pa.array(["61", "55.25"]).dictionary_encode(),
        "dcm": pa.array([False, True]),
        "age_y": pa.array([60.5, float("nan")], pa.float32()),
        "postcode": pa.array(["a", "b"]),
    }
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "labels.parquet")
    assert read_table(str(tmp_path / "labels.parquet"), "subject=eid lvedv_ml=f24100_2_0") == {
        "1001": {"lvedv_ml": 150.0, "lvef_pct": 61.0, "dcm": 0.0, "age_y": 60.5},
        "1002": {"lvef_pct": 55.25, "dcm": 1.0},
    }


def test_file_uri(tmp_path: Path) -> None:
    assert read_table(Path(csv(tmp_path, ROWS)).as_uri()) == READ


def test_every_label_has_a_plausible_range() -> None:
    assert set(PLAUSIBLE) == set(LABELS)
    assert all(low < high for low, high in PLAUSIBLE.values())


@pytest.mark.parametrize(
    ("text", "columns", "said"),
    [
        (ROWS, "subject=eid", "no column 'eid' for subject"),
        (ROWS, "lvef=lvef_pct", "unknown label 'lvef', did you mean lvef_pct"),
        (ROWS, "lvef_pct", "expected label=column"),
        (ROWS, "lvef_pct=lvef_pct lvef_pct=lvedv_ml", "given twice"),
        (ROWS, "lvm_g=lvef", "no column 'lvef' for lvm_g, did you mean 'lvef_pct'"),
        ("eid,lvef_pct\n1,60\n", "", "no column 'subject'"),
        ("subject,name\n1,2\n", "", "no column is called as a label"),
        ("subject,LVEF (pct)\n1,60\n", "", "nearly lvef_pct"),
        ("subject,lvef_pct,lvef_pct\n1,60,61\n", "", "'lvef_pct' is there twice"),
        ("subject,lvef_pct\nx9,60\nx8,61\nx9,62\n", "", "rows 1 and 3 are of the same subject"),
        ("subject,lvef_pct\nx9,60\n,61\n", "", "row 2 names no subject"),
        ("subject,lvef_pct\nx9,60\nx8,Jane\n", "", "lvef_pct: row 2: expected a number"),
        ("subject,lvef_pct\nx9,60\nx8,1e999\n", "", "row 2: expected a finite number"),
        ("subject,lvef_pct\nx9,0.60\nx8,0.55\nx7,\n", "", "2 of 2 values are not within 3 to 95, but lvef_pct is in %"),
        ("subject,lvedv_ml\nx9,0.15\nx8,0.2\n", "", "lvedv_ml is in mL: another unit"),
        ("subject,gcs_pct\nx9,22\nx8,19\n", "", "another unit or sign"),
        ("subject,lvedv_ml\nx9,150\nx8,20000\nx7,120\n", "", "in row 2; correct"),
        ("subject,dcm\nx9,1\nx8,0.5\n", "", "row 2: expected 0 or 1"),
        ("subject,dcm\nx9,1\nx8,2\nx7,0\n", "", "not within 0 to 1"),
        ("subject,lvef_pct\nx9,60,1\n", "", "cannot be read"),
        ("", "", "cannot be read"),
    ],
)
def test_refusals_are_one_line_without_a_cell(tmp_path: Path, text: str, columns: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_table(csv(tmp_path, text), columns)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert not any(private in message for private in ("x9", "x8", "x7", "Jane"))


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    for name, said in (("a.xlsx", "another ending"), ("a.parquet", "cannot be read"), ("b.csv", "found none")):
        with pytest.raises(InputError, match=said):
            read_table(str(tmp_path / name))


def test_join_in_the_source_s_order() -> None:
    labels = join(["002", "004", "001"], READ)
    assert labels == [READ["002"], {}, READ["001"]]
    assert summary(labels) == "labels for 2 of 3 subjects: lvedv_ml 1, lvef_pct 2, dcm 2, male 2"
    assert digest(labels) == digest([dict(reversed(row.items())) for row in labels])
    assert digest(labels) != digest([*labels[:2], {**labels[2], "lvef_pct": 61.5}])


def test_join_of_none_shows_the_shape_of_names_only() -> None:
    with pytest.raises(InputError, match=r"look like 'aaaaaaa999', the table's like '999'; name the right column"):
        join(["patient001"], READ)
