"""The linear baselines: what they see of the k-space, and that the masks' score is what counting says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kmtr.config import RunConfig, override
from kmtr.data.dataset import record
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.order import permutation
from kmtr.evaluate import baselines, probes


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


@pytest.fixture(scope="module")
def scores(small: RunConfig) -> list[baselines.MaskScores]:
    config = override(small, {"evaluate.accelerations": (1, 4)})
    return baselines.score_masks(config, Dataset.open(config.data), lambda done, total: None)


def test_the_mean_mask_is_scored_as_counting_by_hand(small: RunConfig, scores: list[baselines.MaskScores]) -> None:
    """LV cavity only, subject by subject with sets of pixels."""
    masks: dict[str, list[np.ndarray]] = {}
    for split, count in (("train", 24), ("test", 12)):
        reader = Dataset.open(small.data).reader(split, small.data, record.columns_of(small.data.views, (), True))
        for row in permutation(small.seed + 2, 0, len(reader))[:count].tolist():
            study = record.to_study(reader.read([row]))
            whole = np.concatenate([study.views[view].segmentation for view in small.data.views])  # type: ignore[misc]
            masks.setdefault(split, []).append(whole[:, (whole == 1).sum((0, 2, 3)).argmax()])
    votes = np.stack([(np.stack(masks["train"]) == value).sum(0) for value in range(6)])
    most = set(zip(*np.nonzero(votes.argmax(0) == 1), strict=True))
    by_hand = []
    for mask in masks["test"]:
        mine = set(zip(*np.nonzero(mask == 1), strict=True))
        by_hand.append(2 * len(mine & most) / (len(mine) + len(most)))
    assert scores[0].mean[0] == pytest.approx(np.mean(by_hand))
    np.testing.assert_array_equal(scores[0].mean, scores[1].mean)


def test_the_image_says_more_of_the_masks_than_no_input(scores: list[baselines.MaskScores]) -> None:
    assert [s.acceleration for s in scores] == [1, 4]
    assert scores[0].true_acceleration == 1 < scores[1].true_acceleration
    assert scores[0].ridge.mean() > scores[0].mean.mean()
    rows = baselines.mask_table(scores).rows
    assert [row[2] for row in rows] == ["mean mask", "ridge on zero-filled image", "ridge on zero-filled image"]


def test_probes_of_the_controls(small: RunConfig) -> None:
    config = override(small, {"evaluate.accelerations": (1,), "evaluate.targets": ("lvedv_ml", "wall_thickness_mm")})
    sources = {probes.CENTRAL: baselines.central, probes.RIDGE: baselines.low_resolution}
    (s,) = probes.score(config, Dataset.open(config.data), sources, lambda done, total: None, torch.device("cpu"))
    assert set(s.probes) == {probes.CENTRAL, probes.RIDGE, probes.MEAN}
    assert set(s.probes[probes.CENTRAL]) == {"lvedv_ml", "wall_thickness_mm"}
    assert s.probes[probes.RIDGE]["lvedv_ml"].r2 > 0.1


def test_a_class_that_nobody_has_is_no_score() -> None:
    mask = np.array([[[0, 1, 2, 3]]], np.uint8)
    scores = baselines._mean_dice(mask, mask)
    np.testing.assert_array_equal(scores, [1, 1, 1, np.nan, np.nan])
    assert baselines._cells(scores) == ["1.000", "1.000", "1.000", "-", "-", "1.000"]
