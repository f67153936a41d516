"""Population based training (Jaderberg et al. 2017, arXiv 1711.09846): members that fall behind go on from the state of
one that leads, with its settings a little changed.

All members train to the same step, are compared, and go on. A member that is replaced branches off: a new run, whose
first state is the leader's checkpoint (weights, moments, place in the order of subjects), read by any number of workers
at any ZeRO stage. What is decided follows from the ledger and the seed alone, so that a search that was killed decides
as an undisturbed one.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kmtr.train import checkpoint
from kmtr.train.folder import STATISTICS
from kmtr.types import InputError, KmtrError
from tune.ledger import FAILED, FINISHED, Trial
from tune.plan import Plan
from tune.space import Choice, Domain, Space

SHARE = 4
"""One member in so many is replaced at a look, by one of as many that lead."""
FACTOR, RESAMPLED = 1.2, 0.25
"""Numbers are multiplied or divided by `FACTOR`; with the probability `RESAMPLED` a value is drawn anew instead."""
IN_FLIGHT = ("masked", "align", "task", "optimizer", "augment")
"""Sections of numbers that can change during a run, beside `sampling.accelerations` and `model.drop_path`."""


def check(space: Space) -> None:
    """Refuse keys that can't change during a run.

    Raises:
        InputError: one line that names the key.
    """
    for key, domain in space.domains.items():
        numbers = not isinstance(domain, Choice) or all(type(value) in (int, float) for value in domain.values)
        able = key in ("sampling.accelerations", "model.drop_path") or (key.partition(".")[0] in IN_FLIGHT and numbers)
        if not able:
            raise InputError(
                f"search.space.{key}: expected a number of {', '.join(IN_FLIGHT)}, model.drop_path or "
                "sampling.accelerations, which can change during a run, with search.scheduler=pbt"
            )
    if space.size(space.config.search.trials) < 2:
        raise InputError("search.trials: expected at least 2 members with search.scheduler=pbt, got 1")


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


def members(plan: Plan) -> list[Trial]:
    """The present run of every member, by number."""
    latest = {run.number: run for run in sorted(plan.trials, key=lambda run: run.generation)}
    return [latest[number] for number in sorted(latest)]


def exploits(plan: Plan, number: int) -> list[Exploit]:
    """Who is replaced by whom at a look: a pure function of the members' scores, the seed and the look's number."""
    step = looks(plan)[number - 1]
    ranked = sorted(members(plan), key=lambda run: (-_score(run, step), run.number))
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


def explored(space: Space, values: Any, rng: np.random.Generator) -> dict[str, Any]:
    """A leader's values, each a little changed or drawn anew, inside their domains."""
    return {key: _changed(domain, values[key], rng) for key, domain in space.domains.items()}


def _changed(domain: Domain, value: Any, rng: np.random.Generator) -> Any:
    anew, u, up = rng.random() < RESAMPLED, float(rng.random()), rng.random() < 0.5
    if isinstance(domain, Choice):
        place = int(u * len(domain)) if anew else domain.values.index(value) + (1 if up else -1)
        return domain.values[min(max(place, 0), len(domain) - 1)]
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
        behind = [run for run in members(plan) if run.step < step and run.status != FAILED]
        if behind:
            return step, behind
        if max(run.generation for run in members(plan)) < number:
            _replace(plan, number, step)
    left = [run for run in members(plan) if run.status not in (FINISHED, FAILED)]
    return (0, left) if left else None


def _replace(plan: Plan, number: int, step: int) -> None:
    """Let the members that lost at a look branch off those that lead; all in one write of the ledger."""
    root = Path(plan.space.config.storage.root)
    for one in exploits(plan, number):
        child = plan.ledger.branch(one.loser, one.donor, one.values, number, step)
        pin(root / one.donor.name, step, root / child.name)
    plan.ledger.write()


def pin(donor: Path, step: int, child: Path) -> None:
    """Keep the donor's checkpoint of a step, and its tables, in the child's folder: the donor goes on and removes it.

    Files are linked where the file system can, else copied.

    Raises:
        KmtrError: the donor has no such checkpoint.
    """
    target = child / "begin"
    if (target / checkpoint.HEAD).is_file():
        return
    for folder in sorted((donor / "train").glob("checkpoint_*"), reverse=True):
        if (folder / checkpoint.HEAD).is_file() and checkpoint.read_head(folder)["progress"]["step"] == step:
            partial = child / "begin.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(folder, partial, copy_function=_linked)
            _linked(str(donor / STATISTICS), str(child / STATISTICS))
            partial.rename(target)
            return
    raise KmtrError(
        f"search: expected a checkpoint of {donor.name} at step {step}, got none; run.fresh=true starts anew"
    )


def _linked(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except FileExistsError:
        pass
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
    return target
