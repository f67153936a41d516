"""Phenotypes by a linear map from areas of masks: closed form, what is unknown, and what the true masks give."""

from __future__ import annotations

import numpy as np
import torch

from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import Wanted
from kmtr.evaluate.areas import AreaMap, of_predicted, of_truth
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


SIZE = (8.0, 2.0, 1.5)


def test_areas_are_those_of_the_masks_own_extremes_in_mm2() -> None:
    pair = Pair(cycle(5, 5, 5), cycle(10, 30, 4, other=2), None, SIZE)
    seen = of_predicted({"sax": pair}, {"sax": 2, "lax_4ch": 1}).reshape(3, 2, 5)
    np.testing.assert_allclose(seen[0, :, 0], [30 * 3, 4 * 3])
    np.testing.assert_allclose(seen[0, :, 2], [2 * 3, 2 * 3])
    assert np.isnan(seen[1:]).all(), "a slice and a view that are not there"
    assert np.isnan(of_predicted({"sax": Pair(pair.truth, pair.predicted)}, {"sax": 1})).all(), "no size of a pixel"


def test_what_nobody_knows_is_unknown_and_what_shows_no_heart_is_0() -> None:
    def truth(mask: np.ndarray, drawn: list[int] | None = None) -> np.ndarray:
        return of_truth({"sax": Pair(mask, mask, drawn, SIZE)}, {"sax": 1}).reshape(2, 5)

    mask = cycle(10, 4)
    mask[0, 0, 7, 7] = UNLABELLED
    assert np.isfinite(truth(mask)).all(), "the frame with fewer labels is not asked"
    mask[0, 1, 7, 7] = UNLABELLED
    assert np.isnan(truth(mask)).all()
    assert not truth(np.zeros_like(mask)).any()
    assert np.isnan(truth(np.full_like(mask, UNLABELLED))).all()
    assert np.isfinite(truth(cycle(10, 4), [1, 2])).all(0).tolist() == [True, True, False, False, False]
    assert np.isnan(truth(np.zeros_like(mask), [3])).all(), "nobody draws the cavity"
    ridge = Ridge(np.zeros(8), np.ones(8), np.eye(8)[0] * 2, 7.0, 1.0)
    one = AreaMap({"sax": 1}, np.arange(10) % 5 != 4, {"lvedv_ml": ridge})
    assert one({"sax": Pair(mask, cycle(10, 4), [1], SIZE)}) == {"lvedv_ml": 2 * 30 + 7.0}
    assert np.isnan(one({"sax": Pair(mask, mask, None, SIZE)})["lvedv_ml"])


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
