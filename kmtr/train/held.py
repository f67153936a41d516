"""What a validation said of each held-out subject, kept beside a run: two runs that were asked about the same subjects
compare subject by subject.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from kmtr.config import RunConfig
from kmtr.files import write_atomic
from kmtr.metrics.diseases import weighted_auroc
from kmtr.metrics.phenotypes import weighted_r2
from kmtr.metrics.resampling import Statistic, weighted_mean
from kmtr.types import KmtrError

if TYPE_CHECKING:
    from kmtr.train.folder import Outcome

FOLDER = "validation"
R2, AUROC, MEAN = "r2", "auroc", "mean"
"""How a column counts: R2 and AUROC of predictions against the truth, or the mean of scores."""


@dataclass(frozen=True)
class Column:
    """One target of a task.

    Attributes:
        kind: `R2`, `AUROC` or `MEAN`.
        truth: NaN: unknown; of a `MEAN` nothing is asked of it.
        predicted: predictions, or of a `MEAN` scores.
        reference: mean of the training labels, which R2 compares with.
    """

    task: str
    target: str
    kind: str
    truth: Float[np.ndarray, " subject"]
    predicted: Float[np.ndarray, " subject"]
    reference: float = float("nan")

    def statistic(self, weights: Float[np.ndarray, "draw subject"]) -> Float[np.ndarray, " draw"]:
        """The metric on each draw of subjects."""
        if self.kind == MEAN:
            return weighted_mean(self.predicted, weights)
        if self.kind == R2:
            return weighted_r2(self.truth, self.predicted, self.reference, weights)
        return weighted_auroc(self.truth, self.predicted, weights)


@dataclass(frozen=True)
class Held:
    """All columns of one validation."""

    columns: tuple[Column, ...]

    @property
    def subjects(self) -> int:
        return len(self.columns[0].predicted) if self.columns else 0

    @property
    def statistic(self) -> Statistic:
        """The score of the run on each draw of subjects: the mean over tasks of the mean over a task's targets."""
        return partial(_score, self.columns)

    def write(self, folder: Path, step: int) -> None:
        """Keep the validation of a step in a run's folder."""
        arrays: dict[str, np.ndarray] = {
            "names": np.array([f"{c.task}/{c.target}/{c.kind}" for c in self.columns]),
            "reference": np.array([c.reference for c in self.columns]),
            "truth": np.stack([c.truth for c in self.columns]),
            "predicted": np.stack([c.predicted for c in self.columns]),
        }
        target = io.BytesIO()
        np.savez(target, **arrays)  # type: ignore[arg-type]
        path = _path(folder, step)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, target.getvalue())

    @staticmethod
    def read(folder: Path, step: int) -> Held:
        """The validation of a step.

        Raises:
            KmtrError: it is not there, or damaged.
        """
        path = _path(folder, step)
        try:
            with np.load(path, allow_pickle=False) as stored:
                parts = zip(*(stored[name] for name in ("names", "truth", "predicted", "reference")), strict=True)
                columns = []
                for name, truth, said, mean in parts:
                    task, target, kind = str(name).split("/")
                    columns.append(Column(task, target, kind, truth, said, float(mean)))
                return Held(tuple(columns))
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise KmtrError(f"{path}: expected what a validation said of each subject, got {error}") from error


def left(outcome: Outcome, config: RunConfig) -> Held:
    """What was said of each subject by the weights that a finished run leaves: of a run on labels by those that were
    chosen, of pretraining by the last, or by those of the end of masked pretraining where the guard ended alignment.

    Raises:
        KmtrError: it is not there.
    """
    metrics = outcome.metrics
    step = metrics["step"]
    if config.stage == "task" and config.task.keep == "best":
        step = metrics.get("best_step", step)
    elif "align_stopped" in metrics:
        step = config.masked_steps
    return Held.read(Path(outcome.folder), int(step))


def _score(columns: tuple[Column, ...], weights: Float[np.ndarray, "draw subject"]) -> Float[np.ndarray, " draw"]:
    tasks = dict.fromkeys(column.task for column in columns)
    means = [_mean([c.statistic(weights) for c in columns if c.task == task]) for task in tasks]
    return _mean(means)


def _mean(values: list[Float[np.ndarray, " draw"]]) -> Float[np.ndarray, " draw"]:
    """Mean of those that are defined on a draw."""
    stacked = np.stack(values)
    known = ~np.isnan(stacked)
    with np.errstate(invalid="ignore"):
        found: np.ndarray = np.where(known, stacked, 0.0).sum(0) / known.sum(0)
    return found


def _path(folder: Path, step: int) -> Path:
    return folder / FOLDER / f"{step:07d}.npz"
