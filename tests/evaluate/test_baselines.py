"""The linear baselines: what they see of the k-space, and that the masks' score is what counting says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from kmtr import metrics
from kmtr.config import RunConfig, override
from kmtr.data.dataset import record
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.order import permutation
from kmtr.evaluate import baselines, masks, probes, tables
from kmtr.evaluate.predictions import CENTRAL, MASK_RIDGE, MEAN, MEAN_MASK, RIDGE, HeldOut, Name, joined
from kmtr.evaluate.predictions import rows as prediction_rows
from kmtr.evaluate.scores import scores_of
from kmtr.metrics.dense import DICE


def test_features_ignore_gain_and_phase_and_all_that_was_not_sampled(batch: Batch) -> None:
    for features in (baselines.central, baselines.low_resolution):
        plain = features(batch)
        assert plain.shape[0] == len(batch)
        assert plain.any()
        turned = batch.kspace * torch.polar(torch.tensor(7.0), torch.tensor(1.1))
        np.testing.assert_allclose(features(_with(batch, turned)), plain, rtol=1e-3, atol=1e-4)
        noisy = torch.where(batch.sampled[:, :, None, :, :, None], batch.kspace, torch.nan + 0j)
        np.testing.assert_array_equal(features(_with(batch, noisy)), plain)


def _with(batch: Batch, kspace: torch.Tensor) -> Batch:
    return replace(batch, kspace=kspace)


Dice = list[tuple[int, float, dict[Name, np.ndarray]]]


@pytest.fixture(scope="module")
def rows(small: RunConfig) -> pa.Table:
    config = override(small, {"evaluate.accelerations": (1, 4)})
    return masks.score_masks(config, Dataset.open(config.data), lambda done, total: None)


@pytest.fixture(scope="module")
def dice(rows: pa.Table) -> Dice:
    return tables.mean_dice(rows)


def test_the_mean_mask_is_scored_as_counting_by_hand(small: RunConfig, rows: pa.Table, dice: Dice) -> None:
    """LV cavity at end-diastole only, subject by subject with sets of pixels; all views show it."""
    seen: dict[str, dict[str, np.ndarray]] = {"train": {}, "test": {}}
    for split, count in (("train", 24), ("test", 12)):
        reader = Dataset.open(small.data).reader(split, small.data, record.columns_of(small.data.views, (), True))
        for row in permutation(small.seed + 2, 0, len(reader))[:count].tolist():
            study = record.to_study(reader.read([row]))
            whole = np.concatenate([study.views[view].segmentation for view in small.data.views])  # type: ignore[misc]
            seen[split][study.subject_id] = whole
    votes = sum(np.stack([(whole == value).sum(1) for value in range(6)]) for whole in seen["train"].values())
    most = np.asarray(votes).argmax(0)
    groups = [[i for i, v in enumerate(small.data.view_types) if v == view] for view in set(small.data.view_types)]
    by_hand = {}
    for subject, mask in seen["test"].items():
        both = size = 0
        for slices in groups:
            area = (mask[slices] == 1).sum((0, 2, 3))
            if area.any():
                real, guess = mask[slices, int(area.argmax())] == 1, most[slices] == 1
                both, size = both + int((real & guess).sum()), size + int(real.sum() + guess.sum())
        by_hand[subject] = 2 * both / size
    said = {
        row["subject"]: row["value"]
        for row in rows.to_pylist()
        if row["system"] == "mean mask" and row["target"] == "dice_lv_cavity_ed" and row["acceleration"] == 4
    }
    assert said == pytest.approx(by_hand)
    assert dice[0][2][MEAN_MASK][0] == pytest.approx(np.mean(list(by_hand.values())))
    np.testing.assert_array_equal(dice[0][2][MEAN_MASK], dice[1][2][MEAN_MASK])
    scores = [row["truth"] for row in rows.to_pylist() if row["target"].startswith("dice")]
    assert set(scores) == {None}, "a score has no truth"


def test_the_image_says_more_of_the_masks_than_no_input(dice: Dice) -> None:
    assert [r for r, _, _ in dice] == [1, 4]
    assert dice[0][1] == 1 < dice[1][1]
    assert np.nanmean(dice[0][2][MASK_RIDGE]) > np.nanmean(dice[0][2][MEAN_MASK])
    shown = tables.mask_table(dice).rows
    assert [row[2] for row in shown] == ["mean mask", *2 * ["ridge on temporally shared image"]]


def test_probes_of_the_baselines(small: RunConfig) -> None:
    config = override(small, {"evaluate.accelerations": (1,), "evaluate.targets": ("lvedv_ml", "wall_thickness_mm")})
    dataset, sources = Dataset.open(config.data), {CENTRAL: baselines.central, RIDGE: baselines.low_resolution}
    said = probes.score(config, dataset, sources, lambda done, total: None, torch.device("cpu"))
    (s,) = scores_of(said)
    assert set(s.probes) == {CENTRAL, RIDGE, MEAN}
    assert set(s.probes[CENTRAL]) == {"lvedv_ml", "wall_thickness_mm"}
    assert s.probes[RIDGE]["lvedv_ml"].r2 > 0.1
    reader = dataset.reader("test", config.data)
    known = {study.subject_id: study.labels["lvedv_ml"] for study in map(record.to_study, map(reader.read, _each(12)))}
    found = {row["subject"]: row["truth"] for row in said.to_pylist() if row["target"] == "lvedv_ml"}
    assert found == known


def test_subjects_that_the_linear_map_of_masks_has_no_memory_for_are_said(
    small: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(masks, "MOST_BYTES", 1)
    config = override(small, {"evaluate.accelerations": (4,), "evaluate.subjects": 3})
    masks.score_masks(config, Dataset.open(config.data), lambda done, total: None)
    assert [one.message for one in caplog.records if one.name == masks.log.name] == [
        "masks: the linear map is fitted on 3 of 24 training subjects, for memory"
    ]


def _each(count: int) -> list[list[int]]:
    return [[row] for row in range(count)]


def test_a_class_that_nobody_has_is_no_score() -> None:
    mask = np.array([[[0, 1, 2, 3]]], np.uint8)
    held_out = HeldOut(("p",), DICE, np.full((1, 10), np.nan))
    scores = np.tile(metrics.dice(mask, mask, 6), 2)
    said = [
        prediction_rows(name, held_out, scores, acceleration=2, seed=0, labels=3) for name in (MEAN_MASK, MASK_RIDGE)
    ]
    shown = tables.mask_table(tables.mean_dice(joined(said)))
    assert shown.rows[0][3:] == (*3 * ["1.000 / 1.000"], "- / -", "- / -", "1.000 / 1.000")
    assert tables.mean_dice(joined([])) == []


def test_the_linear_map_of_what_is_shown_is_that_of_all_classes_and_pixels(batch: Batch) -> None:
    """Leaving out what no training subject shows changes no pixel: a linear map says 0 of it, and all classes 1."""
    matrix = tuple(batch.kspace.shape[-2:])
    rng = np.random.default_rng(0)
    frames = masks.features(batch, matrix).swapaxes(1, 2)
    count, slices = frames.shape[0] * frames.shape[1], frames.shape[2]
    images = frames.reshape(count, -1)
    truth = rng.integers(0, 4, (count, slices, *matrix)).astype(np.uint8)
    truth[:, :, : matrix[0] // 2] = 0  # of half of the image nobody has anything
    fitted = masks.MaskRidge(images, truth, matrix)
    said = fitted(batch)["masks"].numpy()
    seen = fitted.kernel(images)
    for z in range(slices):
        every = (truth[:, z].reshape(count, -1)[..., None] == np.arange(6)).reshape(count, -1).astype(np.float32)
        weights, bias = fitted.kernel.weights(every)
        scores = (seen @ weights + bias).reshape(*frames.shape[:2], *matrix, 6)
        best, second = np.sort(scores, -1)[..., -1], np.sort(scores, -1)[..., -2]
        sure = (best - second > 1e-4) & ~batch.padded[:, z].numpy()[..., None, None]
        assert sure.mean() > 0.9
        np.testing.assert_array_equal(said[:, z][sure], scores.argmax(-1)[sure])
    assert (said[:, :, :, : matrix[0] // 2] == 0).all()
    assert len(np.unique(said)) >= 4
