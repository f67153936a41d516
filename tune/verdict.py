"""How sure a search is: the best trials, run again with fresh seeds, against the recipe itself with fresh seeds.

A trial is not called best by the score it was chosen for: the best of many scores is high by luck (the winner's curse).
Its fresh scores are compared with the recipe's by t-tests with the variance pooled over all repeated settings,
one-sided, at a level of 5 % over all comparisons together (Bonferroni): where no key matters, one search in twenty at
most names a best setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

LEVEL = 0.05
"""Chance that a search names a best setting where none is better than the recipe."""


@dataclass(frozen=True)
class Comparison:
    """A trial's fresh scores against the recipe's.

    Attributes:
        number: of the trial.
        mean: of its fresh scores.
        gain: that mean less the recipe's.
        low, high: the gain is above `low`, and below `high`, each with 95 % over all comparisons together.
        seeds: fresh scores.
    """

    number: int
    mean: float
    gain: float
    low: float
    high: float
    seeds: int

    @property
    def better(self) -> bool:
        """True if it is better than the recipe beyond noise."""
        return self.low > 0


@dataclass(frozen=True)
class Verdict:
    """What a search has shown.

    Attributes:
        comparisons: of the trials that were run again, the greatest gain first.
        recipe, recipe_seeds: mean and number of the recipe's fresh scores.
        noise_sd: SD over seeds of the score of one setting, pooled over all that were repeated.
        degrees: of freedom of `noise_sd`.
    """

    comparisons: tuple[Comparison, ...]
    recipe: float
    recipe_seeds: int
    noise_sd: float
    degrees: int

    @property
    def best(self) -> Comparison | None:
        """The trial that is better than the recipe beyond noise, the best of them where there are several."""
        return next((one for one in self.comparisons if one.better), None)


def judge(recipe: Sequence[float], candidates: Mapping[int, Sequence[float]]) -> Verdict | None:
    """The verdict; None: there is nothing to compare, or no scatter to compare it with.

    Args:
        recipe: scores of the recipe with fresh seeds.
        candidates: trial number -> its scores with fresh seeds; those with fewer than two are left out.
    """
    known = {number: scores for number, scores in candidates.items() if len(scores) >= 2}
    if len(recipe) < 2 or not known:
        return None
    groups = [np.asarray(scores, dtype=np.float64) for scores in (recipe, *known.values())]
    degrees = sum(len(group) - 1 for group in groups)
    noise = math.sqrt(sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / degrees)
    if noise == 0:
        return None
    base, quantile = float(groups[0].mean()), float(student.ppf(1 - LEVEL / len(known), degrees))
    found = []
    for number, group in zip(known, groups[1:], strict=True):
        mean = float(group.mean())
        reach = quantile * noise * math.sqrt(1 / len(group) + 1 / len(groups[0]))
        found.append(Comparison(number, mean, mean - base, mean - base - reach, mean - base + reach, len(group)))
    return Verdict(tuple(sorted(found, key=lambda one: -one.gain)), base, len(recipe), noise, degrees)


def sentence(verdict: Verdict | None, best: str) -> str:
    """The verdict in one line.

    Args:
        best: the trial with the best score, in words; empty: none finished.
    """
    if not best:
        return "no trial finished with a score"
    if verdict is None:
        return f"not confirmed: {best} scored best; too few runs with fresh seeds say how much of that is noise"
    first = verdict.best or verdict.comparisons[0]
    sure = (
        f"gain {first.gain:+.4f}, above {first.low:+.4f} and below {first.high:+.4f} with 95 % each ({first.seeds} "
        f"fresh seeds against {verdict.recipe_seeds} of the recipe, noise SD {verdict.noise_sd:.4f})"
    )
    if verdict.best is not None:
        return f"confirmed: trial {first.number} is better than the recipe: {sure}"
    if all(one.high < 0 for one in verdict.comparisons):
        return f"the recipe is better: trial {first.number}, the best of those that ran again, has {sure}"
    return f"no difference beyond noise: trial {first.number}, the best of those that ran again, has {sure}"
