"""Paired comparison of rows of a study: differences of a measure on the same held-out subjects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from kmtr.evaluate.task_tables import DRAWS_PER_COMPARISON
from kmtr.metrics import difference, holm
from kmtr.studies.task_measures import ALL, replicates
from kmtr.studies.task_rows import Asked

if TYPE_CHECKING:
    from kmtr.studies.task_study import Study


@dataclass(frozen=True)
class Pair:
    """Two rows that are compared, of one seed or several.

    Attributes:
        about: what is told with the difference.
        measure: name in `task_measures.MEASURES`.
        rows: seed -> the row from whose value that of the other is taken, and the other.
    """

    about: Mapping[str, Any]
    measure: str
    rows: Mapping[int, tuple[Asked, Asked]]


class Drawn:
    """Measures of rows on bootstrap draws of the held-out subjects, each made once.

    Args:
        draws: of subjects; all rows share them.
    """

    def __init__(self, study: Study, draws: int):
        self.study, self.draws = study, draws
        self._values, self._means, self._of = cache(study.rows.values), cache(study.means), cache(self._replicates)

    def __call__(self, asked: Asked, measure: str) -> Float[np.ndarray, "acceleration draw"] | None:
        """The measure at each R, on the held-out subjects (first) and on draws of them; None: the row has none."""
        each = self._of(asked, measure)
        return np.mean([*each.values()], axis=0) if each else None

    def targets(self, asked: Asked, measure: str) -> Mapping[str, Float[np.ndarray, "acceleration draw"]]:
        """Each target of the measure by itself; empty: the row has none."""
        return self._of(asked, measure)

    def _replicates(self, asked: Asked, measure: str) -> dict[str, Float[np.ndarray, "acceleration draw"]]:
        config, truth = self.study.config, self.study.truth
        values, means = self._values(asked), self._means(asked.seed, asked.labels)
        found = [
            replicates(measure, config, values, r, truth, means, self.draws)
            for r in range(len(config.evaluate.accelerations))
        ]
        everywhere = [target for target in found[0] if all(target in one for one in found)]
        return {target: np.stack([one[target] for one in found]) for target in everywhere}


def gains(study: Study, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Differences of pairs at each R and in their mean, with 95 % intervals; p-values of all means are one family
    (Holm). A pair of which a row has nothing of the measure is left out.

    Seeds are averaged within each bootstrap draw of the held-out subjects; R2 compares with the mean of each seed's own
    labelled subjects.
    """
    drawn = Drawn(study, max(study.config.evaluate.bootstrap, DRAWS_PER_COMPARISON * len(pairs)))
    found: list[dict[str, Any]] = []
    for pair in pairs:
        both = [[drawn(two[side], pair.measure) for two in pair.rows.values()] for side in (0, 1)]
        if not pair.rows or any(one is None for one in (*both[0], *both[1])):
            continue  # a floor that too few contoured subjects leave out, say
        a, b = (np.stack([one for one in some if one is not None], axis=-1) for some in both)
        same = {**pair.about, "measure": pair.measure, "seeds": list(pair.rows)}
        found.append(same | {"R": ALL} | _gain(a.mean(0), b.mean(0)))
        found += [same | {"R": r} | _gain(a[i], b[i]) for i, r in enumerate(study.config.evaluate.accelerations)]
    family = [one for one in found if one["R"] == ALL]
    for one, p in zip(family, holm(np.array([one["p"] for one in family])), strict=True):
        one["p_holm"] = float(p)
    return found


def _gain(a: Float[np.ndarray, "draw seed"], b: Float[np.ndarray, "draw seed"]) -> dict[str, Any]:
    gain = difference(a, b)
    return {
        "difference": gain.value,
        "interval": (gain.low, gain.high),
        "p": gain.p,
        "draws": gain.draws,
        "of_seeds": (a[0] - b[0]).tolist(),
    }
