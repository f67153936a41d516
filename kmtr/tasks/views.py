"""Dense truth and predictions of a batch, subject by subject and view by view, as the metrics take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from kmtr.config import Data
from kmtr.data.loader.batch import Batch
from kmtr.metrics.dense import Pair
from kmtr.types import VIEWS


def views_of(batch: Batch, data: Data, truth: Tensor, predicted: Tensor) -> Iterator[dict[str, Pair]]:
    """For every subject its views, without padding.

    Args:
        truth, predicted: ``batch slice t y x``.
    """
    names = np.array([VIEWS[data.view_types[slot]] for slot in batch.slots])
    present, true, said = (~batch.padded).cpu().numpy(), truth.cpu().numpy(), predicted.cpu().numpy()
    drawn = None if batch.contoured is None else batch.contoured.cpu().numpy()
    spacing = None if batch.spacing_mm is None else batch.spacing_mm.cpu().numpy()
    for row in range(len(batch)):
        found = {}
        for view in dict.fromkeys(names.tolist()):
            slices = np.flatnonzero((names == view) & present[row].any(1))
            if not len(slices):
                continue
            first = slices[0]
            at = np.ix_(slices, np.flatnonzero(present[row, first]))
            classes = None if drawn is None else [int(c) for c in np.flatnonzero(drawn[row, first]) if c]
            size = None if spacing is None or not np.isfinite(spacing[row, first]).all() else spacing[row, first]
            height = None if size is None else (float(size[0]), float(size[1]), float(size[2]))
            found[view] = Pair(true[row][at], said[row][at], classes, height)
        yield found


def of_subjects(scores: Sequence[Mapping[str, float]], device: torch.device) -> dict[str, Tensor]:
    """Scores of each subject as float32 ``batch``, by their names."""
    names = scores[0] if scores else ()
    return {name: torch.tensor([one[name] for one in scores], dtype=torch.float32, device=device) for name in names}


def slices_of(data: Data) -> dict[str, int]:
    """Slices of each view of the configuration."""
    names = [VIEWS[view] for view in data.view_types]
    return {name: names.count(name) for name in dict.fromkeys(names)}
