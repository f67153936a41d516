"""F1 at the threshold that validation subjects choose: hand-made scores whose thresholds and F1 are known."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from kmtr.evaluate import finetune, task_tables, thresholds
from kmtr.evaluate.predictions import FINETUNED, MEAN, RIDGE, HeldOut, Name, joined, rows
from kmtr.evaluate.scores import Fit, panel
from kmtr.report.intervals import IntervalTable

TARGETS = ("dcm", "hcm")
OURS = Fit(FINETUNED, 1, 20)
VALIDATED = np.array([[1, 1], [1, 0], [1, 0], [0, 1], [0, 0], [0, 0], [0, 0], [0, np.nan]])
"""dcm has 3 of 8, hcm 2 of 7: too few for a threshold."""
TESTED = np.array([[1, 1], [1, 1], [1, 1], [1, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 1.0]])
SAID = {4: [0.9, 0.8, 0.3, 0.5, 0.2, 0.2, 0.1, 0.1], 8: [0.9, 0.2, 0.2, 0.6, 0.6, 0.1, 0.1, 0.1]}
"""Validation scores of dcm. R = 4: all diseased and one healthy are found from 0.3 on, F1 6/7. R = 8: 1/2 from 0.9 on
alone, 3/4 from 0.2 on.
"""


def said(name: Name, who: str, truth: np.ndarray, r: int, dcm: list[float]) -> pa.Table:
    held_out = HeldOut(tuple(f"{who}-{i}" for i in range(len(truth))), TARGETS, truth)
    both = np.stack([dcm, np.linspace(0, 1, len(truth))], axis=1)
    return rows(name, held_out, both, acceleration=r, seed=1, labels=20)


@pytest.fixture(scope="module")
def tested() -> pa.Table:
    """Of the 4 diseased 3 are at or above 0.3, and 2 of the 6 healthy."""
    scores = [0.9, 0.4, 0.3, 0.29, 0.7, 0.3, 0.1, 0.1, 0.1, 0.0]
    return joined(
        [
            part
            for r in (4, 8)
            for part in (
                said(FINETUNED, "tested", TESTED, r, scores),
                said(RIDGE, "tested", TESTED, r, [-score for score in scores]),
                said(MEAN, "tested", TESTED, r, [0.4] * 10),
            )
        ]
    )


@pytest.fixture(scope="module")
def validated() -> pa.Table:
    return joined(
        [
            part
            for r, scores in SAID.items()
            for part in (
                said(FINETUNED, "validated", VALIDATED, r, scores),
                said(RIDGE, "validated", VALIDATED, r, [-score for score in scores]),
                said(MEAN, "validated", VALIDATED, r, [0.4] * 8),
            )
        ]
    )


def test_each_system_r_and_disease_has_the_threshold_of_its_validation_subjects(
    tested: pa.Table, validated: pa.Table
) -> None:
    found = thresholds.choose(panel(tested), validated)
    np.testing.assert_array_equal(found.values[OURS], [[0.3, np.nan], [0.2, np.nan]])
    np.testing.assert_array_equal(found.values[OURS._replace(name=RIDGE)][0], [-0.9, np.nan])
    np.testing.assert_array_equal(found.values[OURS._replace(name=MEAN)], [[0.4, np.nan]] * 2)
    assert (found.diseased, found.known) == ({"dcm": 3, "hcm": 2}, {"dcm": 8, "hcm": 7})


def table_of(tested: pa.Table, validated: pa.Table | None) -> IntervalTable:
    return next(one for one in task_tables.tables_of(tested, {FINETUNED}, 200, validated) if one.name == "diseases")


def test_the_report_has_f1_with_an_interval_and_says_who_chose(tested: pa.Table, validated: pa.Table) -> None:
    table = table_of(tested, validated)
    for r, system, f1, threshold in (
        (4, FINETUNED, 6 / 9, 0.3),
        (8, FINETUNED, 8 / 10, 0.2),
        (4, MEAN, 8 / 14, 0.4),
    ):
        (row,) = (
            row for row in table.json()["rows"] if (row["disease"], row["R"], row["system"]) == ("dcm", r, system.title)
        )
        assert row["F1"]["value"] == pytest.approx(f1)
        assert 0 <= row["F1"]["low"] < f1 < row["F1"]["high"] <= 1
        assert row["threshold"] == threshold
    assert all(row["F1"] is None for row in table.json()["rows"] if row["disease"] == "hcm")
    assert "diseased of validation subjects: dcm 3 of 8. No F1 where fewer than 3" in table.note
    assert table.note.endswith("hcm 2 of 7.")
    assert "No F1: its threshold is chosen on validation subjects" in table_of(tested, None).note


def test_the_command_s_table_has_the_same(tested: pa.Table, validated: pa.Table) -> None:
    shown, metrics = finetune.disease_table(tested, FINETUNED, validated)
    assert metrics["dcm_f1"] == pytest.approx(0.8)
    assert "hcm_f1" not in metrics
    (cell,) = (row[3] for row in shown.rows if row[:3:2] == (4, FINETUNED.title))
    assert str(cell).endswith("of 0.40, F1 0.67)")
    assert "dcm 3 of 8" in shown.note
    assert "dcm_f1" not in finetune.disease_table(tested, FINETUNED)[1]
