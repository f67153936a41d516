"""Tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011) by Optuna: values near those of the best trials."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from kmtr.config import typed
from tune.ledger import Trial
from tune.space import Choice, Domain, Space


def suggest(space: Space, number: int, known: Iterable[Trial], attempt: int = 0) -> dict[str, Any]:
    """Values of a trial: a pure function of (space, seed, number, what the known trials reported), so that a search
    that is cut in two suggests as a whole one.

    Args:
        attempt: number of the suggestion for this trial, if those before were of no use.
        known: finished trials; stopped ones, which count by their last step and score; and running ones, which count as
            bad, so that two at a time differ. Those of other keys count for the keys that they have.
    """
    import optuna

    seed = int(np.random.SeedSequence([space.config.seed, number, attempt]).generate_state(1)[0])
    domains = space.free
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0, constant_liar=True)
    study = study_of(space, known, sampler)
    asked = study.ask({key: _distribution(optuna, domain) for key, domain in domains.items()})
    drawn = {key: _value(domain, asked.params[key]) for key, domain in domains.items()}
    return space.ordered(space.grid[number % len(space.grid)] | drawn)


def study_of(space: Space, known: Iterable[Trial], sampler: Any = None) -> Any:
    """Optuna's study of trials."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    for trial in known:
        told = _told(optuna, space.free, trial)
        if told is not None:
            study.add_trial(told)
    return study


def _told(optuna: Any, domains: Mapping[str, Domain], trial: Trial) -> Any:
    """A trial as Optuna knows it; None: nothing is to be learnt from it."""
    values = {
        key: trial.values[key] for key in domains if key in trial.values and _inside(domains[key], trial.values[key])
    }
    states = optuna.trial.TrialState
    state = {"finished": states.COMPLETE, "stopped": states.PRUNED, "waiting": states.RUNNING}.get(trial.status)
    if not values or state is None or (state != states.RUNNING and not np.isfinite(trial.score)):
        return None
    return optuna.trial.create_trial(
        state=state,
        value=trial.score if state == states.COMPLETE else None,
        params={key: typed(v) if isinstance(domains[key], Choice) else v for key, v in values.items()},
        distributions={key: _distribution(optuna, domains[key]) for key in values},
        intermediate_values=dict(trial.reports) if state != states.COMPLETE else {},
    )


def _inside(domain: Domain, value: Any) -> bool:
    return value in domain.values if isinstance(domain, Choice) else bool(domain.low <= value <= domain.high)


def _distribution(optuna: Any, domain: Domain) -> Any:
    if isinstance(domain, Choice):
        return optuna.distributions.CategoricalDistribution([typed(value) for value in domain.values])
    if domain.whole:
        return optuna.distributions.IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return optuna.distributions.FloatDistribution(domain.low, domain.high, log=domain.log)


def _value(domain: Domain, drawn: Any) -> Any:
    """A drawn value as the key has it, in as many digits as others."""
    if isinstance(domain, Choice):
        return next(value for value in domain.values if typed(value) == drawn)
    return domain.rounded(drawn)
