"""Ledger of a search: its runs and what came of each, kept in a file so that nothing that ended is run twice."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kmtr.files import write_atomic
from kmtr.types import InputError

STATE = "search.json"
RECIPE = -1
"""Number of the recipe itself among trials."""
WAITING, FINISHED, STOPPED, FAILED = "waiting", "finished", "stopped", "failed"


@dataclass(frozen=True)
class Trial:
    """A run of a search and what came of it.

    Attributes:
        number: of the trial, or of the one that it repeats; `RECIPE`: nothing is changed.
        name: of its run, its folder in storage.root.
        values: keys that it changes.
        seed: of a repeat; None: the search's own.
        status: waiting (never ended: the next command goes on with it), finished, stopped (by ASHA) or failed.
        reports: (step, score) at every validation.
        result: score of the weights that a finished run left.
        run_id: of its MLflow run; empty: it has none yet.
        encoder: folder of the exported encoder or model of a finished run.
        reason: of a failure, one line.
        seconds: from its begin to its end, over all commands.
        generation: number of the look at which it branched off (population based training).
        donor: run that it branched off; begun: at which step.
    """

    number: int
    name: str
    values: Mapping[str, Any]
    seed: int | None = None
    status: str = WAITING
    reports: tuple[tuple[int, float], ...] = ()
    result: float | None = None
    run_id: str = ""
    encoder: str = ""
    reason: str = ""
    seconds: float = 0.0
    generation: int = 0
    donor: str = ""
    begun: int = 0

    @property
    def repeats(self) -> bool:
        """True if it tells how much a score varies, and is no trial."""
        return self.seed is not None

    @property
    def score(self) -> float:
        """Score of the weights that it left; of a run that did not finish, the last reported; NaN: none."""
        if self.result is not None:
            return self.result
        return self.reports[-1][1] if self.reports and self.status != FINISHED else math.nan

    @property
    def step(self) -> int:
        return self.reports[-1][0] if self.reports else 0

    @property
    def ended(self) -> bool:
        return self.status in (FINISHED, STOPPED)

    @property
    def scored(self) -> bool:
        """True if it finished with a score."""
        return self.status == FINISHED and math.isfinite(self.score)


class Ledger:
    """All runs of a search in ``search.json``; the process of the command is its one owner.

    Raises:
        InputError: the file holds something else.
    """

    def __init__(self, folder: Path, name: str):
        self.path, self.name = folder / STATE, name
        self.runs: dict[str, Trial] = {}
        if self.path.is_file():
            try:
                self.runs = {item["name"]: _trial(item) for item in json.loads(self.path.read_text())}
            except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                raise InputError(
                    f"{self.path}: expected runs of a search, got a {type(error).__name__}; run.fresh=true starts anew"
                ) from None

    @property
    def trials(self) -> list[Trial]:
        """Those that were drawn, by number; no repeats."""
        return sorted(
            (run for run in self.runs.values() if not run.repeats), key=lambda trial: (trial.number, trial.generation)
        )

    def repeats(self, number: int) -> list[Trial]:
        """Runs of a trial, or of the `RECIPE`, with other seeds, by seed."""
        found = (run for run in self.runs.values() if run.repeats and run.number == number)
        return sorted(found, key=lambda run: run.seed or 0)

    def add(self, number: int, values: Mapping[str, Any], seed: int | None = None) -> Trial:
        """A new run; it is kept when the ledger is next written."""
        name = f"{self._label(number)}" + ("" if seed is None else f"-seed{seed}")
        self.runs[name] = Trial(number, name, dict(values), seed)
        return self.runs[name]

    def branch(self, loser: Trial, donor: Trial, values: Mapping[str, Any], generation: int, step: int) -> Trial:
        """A new run for a loser, from the donor's state at a step; `put` makes it take the loser's place."""
        name = f"{self._label(loser.number)}-g{generation}"
        reports = ((step, dict(donor.reports)[step]),)
        child = Trial(loser.number, name, dict(values), reports=reports, generation=generation)
        return replace(child, donor=donor.name, begun=step)

    def put(self, children: Iterable[tuple[Trial, Trial]]) -> None:
        """Let branches take the places of losers, all in one write.

        Args:
            children: pairs of branch and loser.
        """
        for child, loser in children:
            self.runs[child.name] = child
            if loser.status != FAILED:
                self.runs[loser.name] = replace(loser, status=STOPPED, run_id="")  # which MLflow is to be told
        self.write()

    def _label(self, number: int) -> str:
        return f"{self.name}-" + ("recipe" if number == RECIPE else f"{number:03d}")

    def update(self, name: str, **changes: Any) -> Trial:
        self.runs[name] = replace(self.runs[name], **changes)
        self.write()
        return self.runs[name]

    @property
    def digest(self) -> str:
        """Hash of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest() if self.path.is_file() else ""

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps([asdict(run) for run in self.runs.values()], indent=1))

    def ranked(self) -> list[Trial]:
        """The finished trials, the best first; equal ones by number."""
        return sorted((t for t in self.trials if t.scored), key=lambda t: (-t.score, t.number))


def _trial(item: dict[str, Any]) -> Trial:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in item["values"].items()}
    return Trial(**item | {"values": values, "reports": tuple((step, score) for step, score in item["reports"])})
