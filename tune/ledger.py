"""Ledger of a search: its trials and what came of each, kept in a file so that nothing that ended is run twice."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kmtr.files import write_atomic

STATE = "search.json"


@dataclass(frozen=True)
class Trial:
    """One configuration of a search and what came of it.

    Attributes:
        name: of its run, its folder in storage.root.
        values: keys that it changes.
        status: waiting (never ended: the next command goes on with it), finished, stopped (by ASHA) or failed.
        reports: (step, score) at every validation.
        run_id: of its MLflow run; empty: it has none yet.
        encoder: folder of the exported encoder of a finished trial.
        reason: of a failure, one line.
    """

    number: int
    name: str
    values: dict[str, Any]
    status: str = "waiting"
    reports: tuple[tuple[int, float], ...] = ()
    run_id: str = ""
    encoder: str = ""
    reason: str = ""

    @property
    def score(self) -> float:
        return self.reports[-1][1] if self.reports else math.nan

    @property
    def step(self) -> int:
        return self.reports[-1][0] if self.reports else 0

    @property
    def ended(self) -> bool:
        return self.status in ("finished", "stopped")


class Ledger:
    """All trials of a search in ``search.json``; the process of the command is its one owner."""

    def __init__(self, folder: Path, name: str, drawn: Sequence[dict[str, Any]]):
        self.path = folder / STATE
        known = json.loads(self.path.read_text()) if self.path.is_file() else []
        self.all = [_trial(item) for item in known]
        for number in range(len(self.all), len(drawn)):
            self.all.append(Trial(number, f"{name}-{number:02d}", drawn[number]))
        self.wanted = len(drawn)

    @property
    def trials(self) -> list[Trial]:
        """Those of this command; an earlier one may have had more."""
        return self.all[: self.wanted]

    @property
    def done(self) -> bool:
        """True if no trial is left to run and one of them is the best."""
        return self.best() is not None and all(trial.ended for trial in self.trials)

    def update(self, number: int, **changes: Any) -> Trial:
        self.all[number] = replace(self.all[number], **changes)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps([asdict(trial) for trial in self.all], indent=1))
        return self.all[number]

    def best(self) -> Trial | None:
        """The finished trial with the best last score."""
        scored = [t for t in self.trials if t.status == "finished" and math.isfinite(t.score)]
        return max(scored, key=lambda t: t.score, default=None)


def _trial(item: dict[str, Any]) -> Trial:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in item["values"].items()}
    return Trial(**item | {"values": values, "reports": tuple((step, score) for step, score in item["reports"])})
