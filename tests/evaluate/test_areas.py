"""Phenotypes by a linear map from areas of masks: closed form, what is unknown, and what true masks give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import Batch, Wanted
from kmtr.evaluate import mapped
from kmtr.evaluate.mapped import fit_maps, seen_by
from kmtr.evaluate.predictions import MASK_RIDGE, MEAN_MASK, Name
from kmtr.evaluate.probes import Counter
from kmtr.metrics.areas import AreaMap, areas
from kmtr.metrics.dense import Pair
from kmtr.metrics.ridge import Ridge
from kmtr.tasks.views import slices_of, views_of
from kmtr.types import UNLABELLED

SIZE = (8.0, 2.0, 1.5)
CPU = torch.device("cpu")


def cycle(*sizes: int, other: int = 0) -> np.ndarray:
    """One slice of 8 x 8 whose cavity has so many pixels in each frame; `other` pixels are of the RV."""
    mask = np.zeros((1, len(sizes), 8, 8), np.uint8)
    for t, size in enumerate(sizes):
        mask[0, t].flat[:size] = 1
        mask[0, t].flat[60 : 60 + other] = 3
    return mask


def seen(mask: np.ndarray, size: tuple[float, float, float] | None = SIZE) -> dict[str, Pair]:
    return {"sax": Pair(mask, mask, [1], size)}


def test_areas_are_their_mean_and_harmonics_in_mm2() -> None:
    """An area of 20 + 8 cos(phase) - 4 sin(2 phase), sampled at 8 frames."""
    phase = 2 * np.pi * np.arange(8) / 8
    pixels = 20 + 8 * np.cos(phase) - 4 * np.sin(2 * phase)
    found = areas(seen(cycle(*np.round(pixels).astype(int), other=2)), {"sax": 2, "lax_4ch": 1}).reshape(3, 5, 5)
    np.testing.assert_allclose(found[0, :, 0], np.array([20, 4, 0, 0, 2]) * 3, atol=0.4)
    np.testing.assert_allclose(found[0, :, 2], [2 * 3, 0, 0, 0, 0], atol=1e-12)
    assert np.isnan(found[1:]).all(), "a slice and a view that are not there"
    assert np.isnan(areas(seen(cycle(5), None), {"sax": 1})).all(), "no size of a pixel"
    one = areas(seen(cycle(5)), {"sax": 1}).reshape(5, 5)
    np.testing.assert_array_equal(one[:, 0], [15, 0, 0, 0, 0], "one frame has no harmonics")


def test_what_nobody_knows_is_unknown_and_what_shows_no_heart_is_0() -> None:
    mask = cycle(10, 4)
    assert not areas(seen(np.zeros_like(mask)), {"sax": 1}).any()
    ridge = Ridge(np.zeros(20), np.ones(20), np.eye(20)[0] * 2, 7.0, 1.0)
    one = AreaMap({"sax": 1}, np.arange(25) % 5 != 4, {"lvedv_ml": ridge})
    assert one(seen(mask)) == {"lvedv_ml": 2 * 7 * 3 + 7.0}
    mask[0, 0, 7, 7] = UNLABELLED
    assert np.isnan(one(seen(mask))["lvedv_ml"])


def test_a_map_undoes_what_masks_get_wrong_alike() -> None:
    """Masks that show half of the motion: the map knows, as one of true masks would not."""
    generator = np.random.default_rng(0)
    beats = generator.integers(2, 20, 40)
    features = np.stack([areas(seen(cycle(*(30 + b // 2 * np.array([1, 0, -1, 0])))), {"sax": 1}) for b in beats])
    labels = np.stack([beats - beats % 2, np.full(40, np.nan)], 1).astype(float)
    found = AreaMap.fit({"sax": 1}, features, labels, ["lvef_pct", "lvm_g"])
    assert found is not None
    assert list(found.ridges) == ["lvef_pct"], "of a label that nobody has there is none"
    assert found.shown.sum() == 1, "areas in which no two subjects differ do not count"
    said = found(seen(cycle(35, 30, 25, 30)))["lvef_pct"]
    assert said == pytest.approx(10, abs=0.1)
    features[3] = np.nan
    assert AreaMap.fit({"sax": 1}, features, labels, ["lvef_pct"]) is not None, "a subject without counts for nothing"
    assert AreaMap.fit({"sax": 1}, features[:3], labels[:3], ["lvef_pct"]) is not None
    assert AreaMap.fit({"sax": 1}, features[2:4], labels[2:4], ["lvef_pct"]) is None
    alike = AreaMap.fit({"sax": 1}, features[[0] * 40], labels, ["lvef_pct", "lvm_g"])
    assert alike is not None
    assert alike(seen(cycle(5, 3))) == {"lvef_pct": pytest.approx(labels[:, 0].mean())}, "the mean of all masks alike"


def test_the_linear_map_to_masks_is_asked_of_subjects_that_it_is_not_fitted_on(
    small: RunConfig, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every labelled subject is seen once, by the floor that is fitted on the other half."""
    fitted: list[list[int]] = []
    asked: list[tuple[list[int], list[int]]] = []

    def fit(config: RunConfig, where: Reader, rows: list[int], batches: object) -> dict[Name, object]:
        fitted.append(list(rows))
        return {MASK_RIDGE: dict, MEAN_MASK: dict}

    def seen_by(
        data: object, predictors: dict[Name, object], rows: list[int], device: object
    ) -> dict[Name, np.ndarray]:
        assert list(predictors) == [MASK_RIDGE]
        asked.append((fitted[-1], rows))
        return {MASK_RIDGE: np.array(rows, float)[:, None]}

    monkeypatch.setattr(mapped, "seen_by", seen_by)
    kept: dict[Name, np.ndarray] = {}
    monkeypatch.setattr(mapped, "fit_maps", lambda data, seen, *more: kept.update(seen) or {})
    monkeypatch.setattr(mapped.Mapped, "_read", lambda self, config, rows, tell, wanted: list(rows))
    labelled = [7, 3, 5, 1, 6, 2, 0]
    mapped.Mapped.of(small, reader, labelled, ("lvedv_ml",)).of_floor(small, fit, Counter(lambda *_: None, 1))
    assert sorted(row for _, rows in asked for row in rows) == sorted(labelled)
    assert all(not {*others} & {*rows} for others, rows in asked)
    np.testing.assert_array_equal(kept.pop(MASK_RIDGE)[:, 0], labelled)
    mapped.Mapped.of(small, reader, labelled, ()).of_floor(small, fit, Counter(lambda *_: None, 1))
    assert not kept, "no phenotypes are asked for"


def test_true_masks_give_the_volumes_that_they_were_drawn_with(small: RunConfig, reader: Reader) -> None:
    rows, names = range(len(reader)), ("lvedv_ml", "rvedv_ml")

    def true(batch: Batch) -> dict[str, torch.Tensor]:
        assert batch.masks is not None
        return {"masks": batch.masks}

    def hosts() -> list:
        return [*pipeline.read_in_order(reader, list(rows), len(reader), small, Wanted(masks=True))]

    truth, name = subjects.labels_of(reader, rows, names), Name("true masks", "")
    found = fit_maps(small.data, seen_by(small.data, {name: true}, hosts(), CPU), truth, names)
    assert seen_by(small.data, {}, hosts(), CPU) == fit_maps(small.data, {}, truth, names) == {}
    batch = hosts()[0].to(CPU)
    assert batch.masks is not None
    assert found[name].slices == slices_of(small.data)
    said = [found[name](each) for each in views_of(batch, small.data, batch.masks, batch.masks)]
    for column, target in enumerate(names):
        assert np.corrcoef([one[target] for one in said], truth[:, column])[0, 1] > 0.9
