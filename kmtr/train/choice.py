"""Choice of the weights that training on labels leaves, by held-out labels, and its early end: pure functions of what
the validations said.

Every task says one score of which more is better and 1 is perfect (`base.SCORE`: mean R2, mean AUROC, ...).
Checkpoints compare by `SCORE`, the mean over the tasks that could be scored. Equal scores: the earlier.

Whose labels choose is told with every result: they are labels that a run uses beside those that it trains on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from kmtr.config import RunConfig
from kmtr.train.checkpoint import Progress

SCORE = "val/score"
"""Metric of a validation by which checkpoints of a run on labels compare; there is none without held-out subjects."""


def overall(scores: Iterable[float]) -> dict[str, float]:
    """`SCORE` of the tasks' scores; those that are NaN (a disease that no held-out subject has) are left out, and
    where all are there is none.
    """
    known = [score for score in scores if math.isfinite(score)]
    return {SCORE: float(np.mean(known))} if known else {}


def judge(progress: Progress, metrics: dict[str, float]) -> bool:
    """Count a validation of the step that `progress` is at; True if none before it was as good.

    One without a score counts neither way.
    """
    score = metrics.get(SCORE, math.nan)
    if not math.isfinite(score):
        return False
    if progress.best_step and score <= progress.best[SCORE]:
        progress.worse += 1
        return False
    progress.best_step, progress.best, progress.worse = progress.step, dict(metrics), 0
    return True


def ends(progress: Progress, config: RunConfig) -> bool:
    """True if the last `task.patience` validations before the last step were no better than the best."""
    return 0 < config.task.patience <= progress.worse and progress.step < config.total_steps


def keeps_best(progress: Progress, config: RunConfig) -> bool:
    """True if the run leaves the weights of its best validation, False for those of its last step."""
    return config.stage == "task" and config.task.keep == "best" and progress.best_step > 0


def result(progress: Progress, config: RunConfig, held_out: int) -> dict[str, float]:
    """Metrics of the weights that a run on labels leaves, and of the choice: ``best_step``, ``best_score``,
    ``last_score`` and ``validation_subjects``, as far as there are any.

    Args:
        held_out: subjects whose labels chose.
    """
    found = dict(progress.best if keeps_best(progress, config) else progress.metrics)
    found["validation_subjects"] = float(held_out if progress.best_step else 0)
    if progress.best_step:
        found |= {"best_step": float(progress.best_step), "best_score": progress.best[SCORE]}
        found |= {"last_score": progress.metrics[SCORE]} if SCORE in progress.metrics else {}
    return found


def shown(metrics: dict[str, float], config: RunConfig) -> tuple[str, dict[str, Any]]:
    """The choice in words, and for a command's last line: ``best`` and ``last`` (``step``, ``score``), and
    ``validation_subjects``.

    Args:
        metrics: `result`, as the run's folder keeps it with its last ``step``.
    """
    last = {"step": int(metrics["step"]), "score": metrics.get("last_score")}
    best, count = None, int(metrics.get("validation_subjects", 0))
    if "best_step" in metrics:
        best = {"step": int(metrics["best_step"]), "score": metrics["best_score"]}
    said = {"best": best, "last": last, "validation_subjects": count}
    if best is None:
        return f"the last step, {last['step']}, since no labels of validation subjects could choose", said
    scores = [f"step {one['step']} (val/score {one['score']:.3f})" for one in (best, last)]
    whose = f"{count} validation subjects, whose labels were used besides"
    if config.task.keep == "best":
        return f"{scores[0]}, chosen by {whose}; the last was {scores[1]}", said
    early = f", ended early by {whose}" if config.task.patience else ""
    return f"the last step, {scores[1]}{early}; the best was {scores[0]} of {count} validation subjects", said
