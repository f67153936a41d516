"""Diseases read off phenotypes: a floor on what a ridge says, a ceiling on the truth that is no floor."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from kmtr.data.loader.batch import Batch
from kmtr.evaluate import finetune, task_tables
from kmtr.evaluate.predictions import (
    CEILING,
    FINETUNED,
    MEAN,
    READ_OFF,
    RIDGE,
    HeldOut,
    Name,
    by_areas,
    joined,
    rows,
)
from kmtr.evaluate.predictors import ReadOff
from kmtr.metrics import fit_logistic, from_phenotypes

RNG = np.random.default_rng(2)
VOLUME = RNG.normal(150, 30, 60)
SICK = (VOLUME + RNG.normal(0, 10, 60) > 170).astype(float)
NAN = np.full(60, np.nan)


def test_each_disease_is_regressed_on_the_phenotypes_that_are_known() -> None:
    few = NAN.copy()
    few[:2] = 60.0
    unknown = np.where(np.arange(60) % 5 == 0, np.nan, SICK)
    found = from_phenotypes.fit(
        {"lvedv_ml": VOLUME, "lvef_pct": few}, {"dcm": unknown, "hcm": np.zeros(60), "cad": NAN}
    )
    assert found.phenotypes == ("lvedv_ml",), "of fewer than 3 subjects none is used"
    assert set(found.of) == {"dcm"}, "a disease that all lack, or of which nothing is known, can't be learnt"
    known = np.isfinite(unknown)
    expected = fit_logistic(VOLUME[known, None], SICK[known])(VOLUME[:, None])
    said = found(VOLUME[:, None], ("hcm", "dcm"))
    assert np.isnan(said[:, 0]).all()
    np.testing.assert_allclose(said[:, 1], expected)
    assert from_phenotypes.fit({"lvef_pct": few}, {"dcm": SICK}).of == {}
    assert from_phenotypes.fit({}, {"dcm": SICK})(np.empty((4, 0)), ("dcm",)).shape == (4, 1)


def test_the_floor_is_the_regression_of_what_is_predicted(batch: Batch) -> None:
    found = from_phenotypes.fit({"lvedv_ml": VOLUME, "lvsv_ml": VOLUME / 2}, {"dcm": SICK})
    predicted = {"lvsv_ml": torch.tensor([70.0, 110.0]), "lvedv_ml": torch.tensor([150.0, 220.0])}

    def ridge(batch: Batch, /) -> dict[str, torch.Tensor]:
        return predicted | {"hcm": torch.zeros(2)}

    said = ReadOff(ridge, found)(batch)
    assert set(said) == {"dcm"}
    np.testing.assert_allclose(said["dcm"], found(np.array([[150.0, 70.0], [220.0, 110.0]]), ("dcm",))[:, 0])


def said(name: Name, values: np.ndarray) -> pa.Table:
    held_out = HeldOut(tuple(f"subject-{i}" for i in range(60)), ("dcm",), SICK[:, None])
    return rows(name, held_out, values[:, None], acceleration=4, seed=1, labels=20)


@pytest.fixture(scope="module")
def predicted() -> pa.Table:
    """The ceiling is perfect, the floor from phenotypes better than the ridge."""
    noise = np.random.default_rng(0).standard_normal(60)
    systems = {FINETUNED: SICK + 0.8 * noise, RIDGE: noise, READ_OFF: SICK + 0.5 * noise[::-1], CEILING: SICK}
    return joined([said(name, values) for name, values in (systems | {MEAN: np.full(60, 0.3)}).items()])


def test_the_strongest_floor_may_be_read_off_phenotypes_and_is_never_the_ceiling(predicted: pa.Table) -> None:
    tables = {one.name: one for one in task_tables.tables_of(predicted, {FINETUNED}, 200)}
    (gain,) = tables["diseases_gain"].json()["rows"]
    assert gain["strongest floor"] == "phenotypes then disease on low-res image"
    assert gain["system"] == FINETUNED.title
    shown = {row["system"]: row["AUROC"]["value"] for row in tables["diseases"].json()["rows"]}
    assert shown["ceiling, disease on true phenotypes"] == 1.0
    assert shown[READ_OFF.title] < 1
    assert "it is no floor" in tables["diseases"].note


def test_what_areas_say_of_some_subjects_is_scored_and_compared_on_these(predicted: pa.Table) -> None:
    """Areas of 40 of 60 subjects: the strongest floor is asked of the same 40, and nothing is NaN."""
    areas = np.where(np.arange(60) < 40, SICK + 0.1, np.nan)
    table = joined([predicted, said(by_areas(FINETUNED), areas)])
    tables = {
        one.name: one.json()["rows"] for one in task_tables.tables_of(table, {FINETUNED, by_areas(FINETUNED)}, 200)
    }
    (gain,) = (row for row in tables["diseases_gain"] if row["system"] == by_areas(FINETUNED).title)
    assert (gain["strongest floor"], gain["subjects"]) == ("phenotypes then disease on low-res image", 40)
    shown, metrics = finetune.disease_table(table, FINETUNED, table)
    assert metrics["dcm_auroc_areas"] == 1.0
    assert metrics["dcm_f1_areas"] == 1.0, "the threshold is that of validation subjects whose areas are known"
    (row,) = (row for row in shown.rows if row[2] == by_areas(FINETUNED).title)
    assert row[3] == f"1.000 (AP 1.00 of {SICK[:40].mean():.2f}, F1 1.00, 40 subjects)"
