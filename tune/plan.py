"""What a search runs next: a pure policy over its ledger, the same for Ray's trials and for planted objectives."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from kmtr.config import RunConfig, override
from kmtr.types import InputError
from tune import tpe
from tune.ledger import FAILED, RECIPE, WAITING, Ledger, Trial
from tune.space import Space
from tune.verdict import Verdict, judge

ATTEMPTS = 20
"""Suggestions of TPE for one trial, if they can't run or were tried before; then the next draw at random is taken."""
LOOKED_AT = 1000
"""Draws at random among which one that can run is looked for."""
HOPELESS = 3
"""Trials that fail, with none that reported anything, after which a search ends early."""


class Plan:
    """The runs of a search in their order: its trials, then the best of them and the recipe with fresh seeds.

    Args:
        earlier: trials of other searches that TPE learns from.
    """

    def __init__(self, space: Space, ledger: Ledger, earlier: Sequence[Trial] = ()):
        self.space, self.ledger, self.earlier = space, ledger, tuple(earlier)
        self.search = space.config.search
        self.wanted = space.size(self.search.trials)

    @property
    def trials(self) -> list[Trial]:
        """Those of this command; an earlier one may have had more."""
        return [trial for trial in self.ledger.trials if trial.number < self.wanted]

    @property
    def members(self) -> list[Trial]:
        """The present run of every trial, by number: in population based training the last that branched off."""
        latest = {run.number: run for run in sorted(self.trials, key=lambda run: run.generation)}
        return [latest[number] for number in sorted(latest)]

    @property
    def adapts(self) -> bool:
        """True if values of later trials follow from the scores of earlier ones."""
        return self.search.sampler == "tpe" and bool(self.space.free)

    def again(self) -> None:
        """Let what failed in an earlier command be tried once more."""
        present = [*self.members, *(run for run in self.ledger.runs.values() if run.repeats)]
        for run in [run for run in present if run.status == FAILED]:
            self.ledger.runs[run.name] = replace(run, status=WAITING, reason="")

    def drawn(self) -> None:
        """Draw all trials whose values follow from nothing that is found out.

        Raises:
            InputError: values that do not go together.
        """
        first = self.search.startup if self.adapts and not self.earlier else 0 if self.adapts else self.wanted
        there = {trial.number for trial in self.ledger.trials}
        drawn = self.space.drawn(min(first, self.wanted))
        for number, values in enumerate(drawn):
            if number not in there:
                self.space.check(values)
                self.ledger.add(number, values)

    def next_trial(self, begun: Collection[str]) -> Trial | None:
        """The trial that begins next; None: all have begun.

        Args:
            begun: names of those that this command has begun.
        """
        known = {trial.number: trial for trial in self.trials}
        for number in range(self.wanted):
            trial = known.get(number)
            if trial is None:
                return self._suggested(number)
            if trial.status in (WAITING, FAILED) and trial.name not in begun:
                return trial
        return None

    def _suggested(self, number: int) -> Trial:
        known = [*self.earlier, *self.trials]
        tried = [dict(trial.values) for trial in self.trials]
        for attempt in range(ATTEMPTS):
            values = tpe.suggest(self.space, number, known, attempt)
            if values not in tried and self.space.able(values):
                break
        else:
            others = islice(self.space.all_drawn(), len(tried) + LOOKED_AT)
            values = next((found for found in others if found not in tried and self.space.able(found)), {})
            if not values:
                raise InputError(f"search.space: no point for trial {number} can run; narrow the domains")
        trial = self.ledger.add(number, values)
        return self.ledger.update(trial.name)  # whatever comes, this trial has these values

    def candidates(self) -> list[Trial]:
        """The best trials, which are to run again; the recipe's own settings among them need not."""
        different: list[Trial] = []
        for trial in self.ranked():
            if self._differs(trial) and all(dict(trial.values) != dict(other.values) for other in different):
                different.append(trial)
        return different[: self.search.confirm.best]

    def ranked(self) -> list[Trial]:
        """The finished trials of this command, the best first."""
        return [trial for trial in self.ledger.ranked() if trial.number < self.wanted]

    def _differs(self, trial: Trial) -> bool:
        return override(self.space.config, dict(trial.values)) != self.space.config

    def repeats(self) -> list[Trial]:
        """Runs with fresh seeds of the recipe and of all candidates, those first that tell the noise."""
        candidates, confirm, seed = self.candidates(), self.search.confirm, self.space.config.seed
        if not confirm.best or not candidates or self.search.scheduler == "pbt":
            return []
        asked = [(RECIPE, {}, self.search.noise_seeds), *((t.number, t.values, confirm.seeds) for t in candidates)]
        found = []
        for number, values, seeds in asked:
            there = {run.seed: run for run in self.ledger.repeats(number)}
            for fresh in range(seed + 1, seed + 1 + seeds):
                found.append(there.get(fresh) or self.ledger.add(number, values, fresh))
        return found

    @property
    def hopeless(self) -> str:
        """Why it makes no sense to go on; empty: it does."""
        if any(trial.reports or trial.ended for trial in self.trials):
            return ""
        failed = [trial for trial in self.trials if trial.status == FAILED]
        if len(failed) < min(HOPELESS, self.wanted):
            return ""
        return f"the first {len(failed)} trials failed, none of them reported anything: {failed[0].reason}"

    def verdict(self) -> Verdict | None:
        """What the runs with fresh seeds have shown so far."""
        again = sorted({run.number for run in self.ledger.runs.values() if run.repeats} - {RECIPE})
        scores = {
            number: [run.score for run in self.ledger.repeats(number) if run.scored] for number in (RECIPE, *again)
        }
        return judge(scores.pop(RECIPE), scores)

    @property
    def done(self) -> bool:
        """True if nothing is left to run."""
        whole = len(self.members) == self.wanted and all(trial.ended for trial in self.members)
        return whole and all(run.ended for run in self.repeats())


def settings(config: RunConfig, run: Trial) -> RunConfig:
    """The configuration of a run of a search. All are validated on the same subjects with the same patterns."""
    asked = config.train.eval_seed
    changed = {**run.values, "run.name": run.name, "run.fresh": False}
    changed |= {"train.eval_seed": config.seed if asked is None else asked}
    changed |= {"run.begin": str(begin_of(Path(config.storage.root), run))} if run.donor else {}
    return override(config, changed | ({} if run.seed is None else {"seed": run.seed}))


def begin_of(root: Path, child: Trial) -> Path:
    """Where the state is kept at which a run branches off, under its donor's name."""
    return root / child.name / f"begin-{child.donor}"


def rungs(config: RunConfig) -> list[int]:
    """Steps at which ASHA looks, ascending."""
    found, step = [], min(config.search.grace_steps, config.total_steps)
    while step < config.total_steps:
        found.append(step)
        step *= config.search.eta
    return found
