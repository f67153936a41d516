"""Which key mattered: the share of the best scores' difference that each explains."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from tune import tpe
from tune.ledger import Trial
from tune.space import Space

ENOUGH = 30
"""Finished trials below which nothing is said."""


def importance(space: Space, trials: Sequence[Trial]) -> dict[str, float]:
    """Key -> share, the greatest first, by PED-ANOVA (Watanabe et al., IJCAI 2023) of Optuna; empty: too few trials."""
    finished = [trial for trial in trials if trial.scored]
    if len(finished) < ENOUGH or len(space.free) < 2:
        return {}
    import optuna

    study = tpe.study_of(space, finished)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
        )
    return {key: float(share) for key, share in found.items()}
