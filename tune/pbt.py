"""Population based training (Jaderberg et al. 2017, arXiv 1711.09846): members that fall behind go on from the state of
one that leads, with its settings a little changed.

All members train to the same step, are compared, and go on. A member that is replaced branches off: a new run, whose
first state is the leader's checkpoint (weights, moments, place in the order of subjects), read by any number of workers
at any ZeRO stage. What is decided follows from the ledger and the seed alone, so that a search that was killed decides
as an undisturbed one.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kmtr.train.branch import pin
from kmtr.types import InputError, KmtrError
from tune.ledger import FAILED, FINISHED, Trial
from tune.plan import Plan, begin_of
from tune.space import Choice, Domain, Space

SHARE = 4
"""One member in so many is replaced at a look, by one of as many that lead."""
FACTOR, RESAMPLED = 1.2, 0.25
"""Numbers are multiplied or divided by `FACTOR`; with the probability `RESAMPLED` a value is drawn anew instead."""
IN_FLIGHT = (
    "masked.learning_rate",
    "masked.mask_ratio",
    "align.learning_rate",
    "align.temperature",
    "align.static_weight",
    "align.dynamic_weight",
    "task.learning_rate",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "augment.shift",
    "augment.rotation_deg",
    "model.drop_path",
    "sampling.accelerations",
)
"""Keys that can change during a run: what is learnt, and the state of the optimizer, stay the same kind."""


def check(space: Space) -> None:
    """Refuse what population based training can't do.

    Raises:
        InputError: a key that can't change during a run, a run that may end before a look, or a single member.
    """
    config, what = space.config, "with search.scheduler=pbt"
    for key in space.domains:
        if key not in IN_FLIGHT or (key == "align.temperature" and config.align.learn_temperature):
            raise InputError(
                f"search.space.{key}: expected a key that can change during a run {what}, {', '.join(IN_FLIGHT)}"
            )
    if config.align_steps and config.align.guard:
        raise InputError(f"align.guard: expected false {what}, since a member that it ends reaches no look, got true")
    if config.stage == "task" and config.task.patience:
        raise InputError(
            f"task.patience: expected 0 {what}, since members reach every look, got {config.task.patience}"
        )
    if config.search.grace_steps % config.train.eval_every:
        raise InputError(
            f"search.grace_steps: expected a multiple of train.eval_every={config.train.eval_every} {what}, got "
            f"{config.search.grace_steps}"
        )
    if config.search.grace_steps >= config.total_steps:
        raise InputError(
            f"search.grace_steps: expected less than the run's {config.total_steps} steps {what}, got "
            f"{config.search.grace_steps}"
        )
    if config.search.sampler != "random":
        raise InputError(f"search.sampler: expected random {what}, got {config.search.sampler}")
    if space.size(config.search.trials) < 2:
        raise InputError(f"search.trials: expected at least 2 members {what}, got 1")


@dataclass(frozen=True)
class Exploit:
    """A member that is replaced.

    Attributes:
        loser, donor: their runs.
        values: the donor's, changed.
    """

    loser: Trial
    donor: Trial
    values: dict[str, Any]


def looks(plan: Plan) -> list[int]:
    """Steps at which the members are compared, ascending."""
    return list(range(plan.search.grace_steps, plan.space.config.total_steps, plan.search.grace_steps))


def exploits(plan: Plan, number: int) -> list[Exploit]:
    """Who is replaced by whom at a look: a pure function of the members' scores, the seed and the look's number."""
    step = looks(plan)[number - 1]
    ranked = sorted(plan.members, key=lambda run: (-_score(run, step), run.number))
    count = max(1, len(ranked) // SHARE)
    leaders, found = ranked[:count], []
    for loser in ranked[-count:]:
        rng = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([plan.space.config.seed, number, loser.number]))
        )
        donor = leaders[int(rng.integers(len(leaders)))]
        if math.isfinite(_score(donor, step)):
            found.append(Exploit(loser, donor, explored(plan.space, donor.values, rng)))
    return found


def explored(space: Space, values: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A leader's values, each a little changed or drawn anew, inside their domains; as they are, where these do not go
    together.
    """
    found = {key: _changed(domain, values[key], rng) for key, domain in space.domains.items()}
    try:
        space.check(found)
    except InputError:
        return dict(values)
    return found


def _changed(domain: Domain, value: Any, rng: np.random.Generator) -> Any:
    anew, u, up = rng.random() < RESAMPLED, float(rng.random()), rng.random() < 0.5
    if isinstance(domain, Choice):
        place = domain.values.index(value)
        beside = [n for n in (place - 1, place + 1) if 0 <= n < len(domain)] or [place]
        return domain.values[int(u * len(domain)) if anew else beside[up % len(beside)]]
    if anew:
        return domain.at(u)
    other = domain.rounded(value * FACTOR if up else value / FACTOR)
    return domain.rounded(value + (1 if up else -1)) if domain.whole and other == value else other


def _score(run: Trial, step: int) -> float:
    """Score at a look; of a member that failed or reported none less than any."""
    found = dict(run.reports).get(step, math.nan)
    return found if math.isfinite(found) and run.status != FAILED else -math.inf


def next_segment(plan: Plan) -> tuple[int, list[Trial]] | None:
    """Step to which these members train next; 0: to the end. None: all are there. Members that fell behind at a look
    are replaced on the way.

    Raises:
        KmtrError: the checkpoint that one is to branch off is gone.
    """
    for number, step in enumerate(looks(plan), 1):
        behind = [run for run in plan.members if run.step < step and run.status != FAILED]
        if behind:
            return step, behind
        if max(run.generation for run in plan.members) < number:
            _replace(plan, number, step)
    left = [run for run in plan.members if run.status not in (FINISHED, FAILED)]
    return (0, left) if left else None


def _replace(plan: Plan, number: int, step: int) -> None:
    """Let the members that lost at a look branch off those that lead; all in one write of the ledger."""
    root = Path(plan.space.config.storage.root)
    children = []
    for one in exploits(plan, number):
        child = plan.ledger.branch(one.loser, one.donor, one.values, number, step)
        children.append((child, one.loser))
        if not pin(root / one.donor.name, step, begin_of(root, child)):
            raise KmtrError(
                f"search: expected a checkpoint of {one.donor.name} at step {step}, got none; take run.fresh=true"
            )
    if children:
        plan.ledger.put(children)


def tidy(plan: Plan) -> None:
    """Remove the donors' checkpoints of branches that ended: they have had their own since their first step."""
    for run in plan.trials:
        if run.donor and run.ended:
            shutil.rmtree(begin_of(Path(plan.space.config.storage.root), run), ignore_errors=True)
