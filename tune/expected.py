"""Expected duration of a search, by the speed of earlier runs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from kmtr.config import RunConfig, from_json
from kmtr.train.folder import RESULT
from kmtr.train.folder import speeds as speeds_of
from kmtr.types import KmtrError
from tune.pbt import looks
from tune.plan import Plan, rungs
from tune.screen import duration

START_UP_S = 25.0
"""Start of a run's workers by Ray Train, about, on two cores."""
LOOKED_AT = 20
"""Newest runs in storage.root whose speed is asked for."""


def expected(plan: Plan) -> str:
    """The time of what is left, in words."""
    config, search = plan.space.config, plan.search
    trials = plan.wanted - sum(trial.ended for trial in plan.members)
    repeated = search.confirm.best and search.scheduler != "pbt"
    confirmed = search.noise_seeds + search.confirm.best * search.confirm.seeds if repeated else 0
    again = max(0, confirmed - sum(run.repeats and run.ended for run in plan.ledger.runs.values()))
    share = asha_share(config) if search.scheduler == "asha" else 1.0
    seconds = seconds_of_run(plan)
    if seconds is None:
        return (
            "not known: no finished run of these model settings in storage.root says how fast it was; "
            f"{trials} trials of about {share:.0%} of the steps, {again} whole runs with fresh seeds"
        )
    starts = 1 + len(looks(plan)) if search.scheduler == "pbt" else 1
    total = trials * (share * seconds + starts * START_UP_S) + again * (seconds + START_UP_S)
    return f"about {duration(total / search.concurrent)}: a whole run has taken {duration(seconds)}" + (
        f", trials take about {share:.0%} of it under ASHA" if share < 1 else ""
    )


def asha_share(config: RunConfig) -> float:
    """Share of a whole run's steps that a trial takes at the mean, if one of `search.eta` passes at every rung."""
    marks = [0, *rungs(config), config.total_steps]
    spans = enumerate(pairwise(marks))
    return sum((end - start) / config.search.eta**n for n, (start, end) in spans) / config.total_steps


def seconds_of_run(plan: Plan) -> float | None:
    """Seconds that the steps of a whole run take: by this search's own trials, else by the newest run of the same
    model, batch and stage in storage.root; None: there is none.
    """
    own = [run for run in plan.ledger.runs.values() if run.ended and run.step and run.seconds]
    if own:
        return sum(run.seconds for run in own) / sum(run.step for run in own) * plan.space.config.total_steps
    config = plan.space.config
    there = sorted(Path(config.storage.root).glob(f"*/{RESULT}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in there[:LOOKED_AT]:
        try:
            other = from_json((path.parent / "config.json").read_text())
        except (OSError, KmtrError):
            continue
        if (other.model, other.data.global_batch, other.stage) != (
            config.model,
            config.data.global_batch,
            config.stage,
        ):
            continue
        speeds = sorted(speed for _, speed in speeds_of(path.parent))
        if speeds:
            return config.total_steps * config.data.global_batch / speeds[len(speeds) // 2]
    return None
