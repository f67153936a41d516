"""From a long table of predictions to scores and paired comparisons."""

from __future__ import annotations

import numpy as np
import pytest

from kmtr.metrics import agreement, compare, detection, score_table
from kmtr.metrics.tables import COLUMNS
from kmtr.types import InputError

MEANS = {"lvedv_ml": 0.0, "lvef_pct": 0.0}
NOISE = {"kmtr": 0.4, "unet": 0.6, "mean": 3.0}


def table(subjects: int = 60, seeds: tuple[int, ...] = (0, 1), accelerations: tuple[int, ...] = (4, 8)) -> dict:
    """Predictions of three systems with known noise, which grows with R."""
    rng = np.random.default_rng(0)
    truth = {target: rng.standard_normal(subjects) for target in MEANS}
    truth["lvef_pct"][:5] = np.nan
    rows = []
    for system, noise in NOISE.items():
        for r in accelerations:
            for seed in seeds:
                for target, values in truth.items():
                    for n, value in enumerate(values):
                        answer = value + noise * r / 4 * rng.standard_normal() if np.isfinite(value) else 1.0
                        source = "lines" if system == "kmtr" else "zerofilled"
                        rows.append((f"p-{n:03d}", system, source, 100, seed, r, r - 0.1, target, value, answer))
    return {name: np.array(column) for name, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)}


def test_scores_are_the_metrics_of_each_cell() -> None:
    columns = table()
    scores = score_table(columns, "mae")
    assert len(scores) == len(NOISE) * 2 * len(MEANS)
    for score in scores:
        cell = score.cell
        values = []
        for seed in (0, 1):
            rows = (columns["system"] == cell.system) & (columns["R"] == cell.acceleration)
            rows &= (columns["target"] == cell.target) & (columns["seed"] == seed)
            values.append(agreement(columns["truth"][rows], columns["value"][rows], 0.0))
        assert score.estimate.value == pytest.approx(np.mean([v.mae for v in values]))
        assert score.estimate.seed_sd == pytest.approx(np.std([v.mae for v in values], ddof=1))
        assert score.estimate.low < score.estimate.value < score.estimate.high
        assert score.true_acceleration == pytest.approx(cell.acceleration - 0.1)
        assert (len(score.subjects), np.isfinite(score.truth).sum()) == (60, 60 if cell.target == "lvedv_ml" else 55)
        assert cell.labels == 100


def test_the_order_of_rows_changes_nothing() -> None:
    columns = table()
    order = np.random.default_rng(1).permutation(len(columns["subject"]))
    shuffled = {name: column[order] for name, column in columns.items()}
    one, other = (score_table(c, "r2", MEANS, resamples=500) for c in (columns, shuffled))
    assert [(s.cell, s.subjects) for s in one] == [(s.cell, s.subjects) for s in other]
    np.testing.assert_allclose([s.replicates for s in one], [s.replicates for s in other])
    for a, b in zip(compare(one, "unet", "zerofilled"), compare(other, "unet", "zerofilled"), strict=True):
        assert (a.cell, a.p_adjusted) == (b.cell, pytest.approx(b.p_adjusted))


def test_comparisons_are_paired_and_corrected_as_one_family() -> None:
    scores = score_table(table(), "r2", MEANS)
    found = compare(scores, "unet", "zerofilled")
    assert len(found) == 2 * 2 * len(MEANS)
    value = {s.cell: s.estimate.value for s in scores}
    for one in found:
        reference = one.cell._replace(system="unet", input="zerofilled")
        assert one.difference.value == pytest.approx(value[one.cell] - value[reference])
        assert one.difference.p <= one.p_adjusted <= min(1, 8 * one.difference.p + 1e-12)
        assert (one.difference.value > 0) == (one.cell.system == "kmtr")
        assert one.p_adjusted < 0.05


def test_diseases_and_scores() -> None:
    columns = {name: column[table()["system"] != "mean"] for name, column in table().items()}
    sick = np.where(np.isnan(columns["truth"]), np.nan, columns["truth"] > 0)
    found = score_table(columns | {"truth": sick}, "auroc")[0]
    rows = (columns["system"] == found.cell.system) & (columns["R"] == found.cell.acceleration)
    rows &= (columns["target"] == found.cell.target) & (columns["seed"] == 0)
    assert found.replicates[0, 0] == pytest.approx(detection(sick[rows], columns["value"][rows], 0.0).auroc)
    overlap = np.where(columns["subject"] == "p-007", np.nan, columns["value"])
    mean = score_table(columns | {"value": overlap}, "score")[0]
    assert mean.replicates[0, 0] == pytest.approx(np.nanmean(overlap[rows]))


def test_what_cannot_be_compared_is_refused_in_one_line() -> None:
    columns, scores = table(), score_table(table(), "mae", resamples=100)
    with pytest.raises(InputError, match="expected at least 320 resamples for 8 comparisons, got 100"):
        compare(scores, "unet", "zerofilled")
    with pytest.raises(InputError, match="expected scores of nnunet on full, got those of kmtr on lines, mean on"):
        compare(scores, "nnunet", "full")
    missing = {n: c[~((columns["system"] == "kmtr") & (columns["subject"] == "p-003"))] for n, c in columns.items()}
    with pytest.raises(InputError, match="of the same subjects and truths for lvedv_ml, got mae of 59 by kmtr and mae"):
        compare(score_table(missing, "mae"), "unet", "zerofilled")
    other = columns | {"truth": columns["truth"] + (columns["system"] == "kmtr")}
    with pytest.raises(InputError, match="of the same subjects and truths"):
        compare(score_table(other, "mae"), "unet", "zerofilled")


def test_bad_tables_are_refused_in_one_line() -> None:
    columns = table()
    with pytest.raises(InputError, match="expected the training mean of lvedv_ml for r2, got none"):
        score_table(columns, "r2")
    with pytest.raises(InputError, match=r"expected a metric of r2, mae, .*, got 'dice'"):
        score_table(columns, "dice")
    with pytest.raises(InputError, match="true_R is missing"):
        score_table({name: c for name, c in columns.items() if name != "true_R"}, "mae")
    with pytest.raises(InputError, match="expected columns of one length, got subject 10"):
        score_table(columns | {"subject": columns["subject"][:10]}, "mae")
    for rows, said in ((np.r_[: len(columns["R"]), 5], "1 to 2 rows"), (np.r_[1 : len(columns["R"])], "0 to 1 rows")):
        with pytest.raises(InputError, match=f"expected every subject once for each seed, got {said} of one for lv"):
            score_table({name: c[rows] for name, c in columns.items()}, "mae")
    unlike = columns | {"truth": columns["truth"] + (columns["seed"] == 1)}
    with pytest.raises(InputError, match="expected one truth of each subject, got several for"):
        score_table(unlike, "mae")
