"""Phenotypes by a linear map from areas of masks: closed form, what is unknown, and what the true masks give."""

from __future__ import annotations

import numpy as np
import torch

from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import Wanted
from kmtr.evaluate.areas import AreaMap, features
from kmtr.metrics.dense import Pair
from kmtr.metrics.ridge import Ridge
from kmtr.tasks.views import views_of
from kmtr.types import UNLABELLED


def cycle(*sizes: int, other: int = 0) -> np.ndarray:
    """One slice of 8 x 8 whose cavity has so many pixels in each frame; `other` pixels are of the RV."""
    mask = np.zeros((1, len(sizes), 8, 8), np.uint8)
    for t, size in enumerate(sizes):
        mask[0, t].flat[:size] = 1
        mask[0, t].flat[60 : 60 + other] = 3
    return mask


def test_areas_are_those_of_the_masks_own_extremes_in_mm2() -> None:
    pair = Pair(cycle(5, 5, 5), cycle(10, 30, 4, other=2), None, (8.0, 2.0, 1.5))
    seen = features({"sax": pair.predicted}, {"sax": pair}, {"sax": 2, "lax_4ch": 1}).reshape(3, 2, 5)
    np.testing.assert_allclose(seen[0, :, 0], [30 * 3, 4 * 3])
    np.testing.assert_allclose(seen[0, :, 2], [2 * 3, 2 * 3])
    assert not seen[1:].any(), "a slice and a view that are not there"
    bare = Pair(pair.truth, pair.predicted)
    np.testing.assert_allclose(features({"sax": bare.predicted}, {"sax": bare}, {"sax": 1})[0], 30)


def test_what_is_not_labelled_is_unknown_and_what_shows_no_heart_is_0() -> None:
    mask = cycle(10, 4)
    mask[0, 0, 7, 7] = UNLABELLED
    nowhere = np.zeros_like(mask)
    assert np.isfinite(features({"sax": mask}, {"sax": Pair(mask, mask)}, {"sax": 1})).all(), (
        "the frame with fewer labels is not asked"
    )
    mask[0, 1, 7, 7] = UNLABELLED
    assert np.isnan(features({"sax": mask}, {"sax": Pair(mask, mask)}, {"sax": 1})).all()
    assert not features({"sax": nowhere}, {"sax": Pair(nowhere, nowhere)}, {"sax": 1}).any()
    unknown = np.full_like(mask, UNLABELLED)
    assert np.isnan(features({"sax": unknown}, {"sax": Pair(unknown, unknown)}, {"sax": 1})).all()
    one = AreaMap({"sax": 1}, {"lvedv_ml": Ridge(np.zeros(10), np.ones(10), np.eye(10)[0] * 2, 7.0, 1.0)})
    assert one({"sax": Pair(mask, cycle(10, 4))}) == {"lvedv_ml": 27.0}
    assert np.isnan(one({"sax": Pair(mask, mask)})["lvedv_ml"])


def test_true_masks_give_the_volumes_that_they_were_drawn_with(small: RunConfig, reader: Reader) -> None:
    rows, names = range(len(reader)), ("lvedv_ml", "rvedv_ml")
    fitted = AreaMap.fit(small, reader, rows, names)
    assert fitted is not None
    host, *_ = pipeline.read_in_order(reader, list(rows), len(reader), small, Wanted(masks=True))
    batch = host.to(torch.device("cpu"))
    assert batch.masks is not None
    said = [fitted(each) for each in views_of(batch, small.data, batch.masks, batch.masks)]
    truth = subjects.labels_of(reader, rows, names)
    for column, name in enumerate(names):
        assert np.corrcoef([one[name] for one in said], truth[:, column])[0, 1] > 0.9
    assert AreaMap.fit(small, reader, rows[:2], names) is None
