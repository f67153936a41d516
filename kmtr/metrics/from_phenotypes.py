"""Diseases read off phenotypes by logistic regression: a floor on predicted phenotypes, a ceiling on the true ones.

Where the floor is as good as a model, the model has learnt nothing of the disease that volumes do not say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from kmtr.metrics.logistic import Logistic, fit_logistic
from kmtr.metrics.phenotypes import MIN_LABELLED


@dataclass(frozen=True)
class Regressions:
    """Logistic regressions from phenotypes to each of some diseases.

    Attributes:
        phenotypes: in the order of features.
    """

    phenotypes: tuple[str, ...]
    of: Mapping[str, Logistic]

    def __call__(
        self, phenotypes: Float[np.ndarray, "subject phenotype"], targets: Sequence[str]
    ) -> Float[np.ndarray, "subject target"]:
        """Probability of each target; NaN of one that is no disease of these.

        Args:
            phenotypes: in their units; one that is NaN counts as the training subjects' mean.
        """
        nothing = np.full(len(phenotypes), np.nan)
        said = [self.of[target](phenotypes) if target in self.of else nothing for target in targets]
        return np.stack(said, axis=1) if said else np.empty((len(phenotypes), 0))


def fit(
    phenotypes: Mapping[str, Float[np.ndarray, " subject"]], diseases: Mapping[str, Float[np.ndarray, " subject"]]
) -> Regressions:
    """Fit every disease that labelled subjects both have and lack, on the true phenotypes that at least 3 of them have.

    Args:
        phenotypes, diseases: by name, of the labelled training subjects; NaN: unknown.
    """
    names = tuple(name for name, values in phenotypes.items() if np.isfinite(values).sum() >= MIN_LABELLED)
    if not names:
        return Regressions((), {})
    features = np.stack([phenotypes[name] for name in names], axis=1)
    found = {}
    for disease, truth in diseases.items():
        known = np.isfinite(truth) & np.isfinite(features).any(1)
        if 0 < truth[known].sum() < known.sum() and np.isfinite(features[known]).any(0).all():
            found[disease] = fit_logistic(features[known], truth[known])
    return Regressions(names, found)
