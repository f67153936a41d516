"""A run that begins at another run's checkpoint: what it takes from there before its workers start."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kmtr.config import RunConfig
from kmtr.train.checkpoint import HEAD, CheckpointError, read_head
from kmtr.train.folder import MASKED_ENCODER, STATISTICS
from kmtr.types import InputError


def begin(config: RunConfig, folder: Path) -> None:
    """Take the other run's tables, and its encoder of the end of masked pretraining, into a new run's folder; a run
    that has a checkpoint of its own needs neither the other run nor this.

    Raises:
        InputError: `run.begin` is no checkpoint of a run, or one behind this run's end.
    """
    if not config.run.begin or any((folder / "train").glob("checkpoint_*")):
        return
    place = Path(config.run.begin)
    try:
        step = read_head(place)["progress"]["step"]
    except CheckpointError as error:
        raise InputError(
            f"run.begin: expected a run's checkpoint, RUN/train/checkpoint_..., got {place}: {error}"
        ) from None
    if step >= config.total_steps:
        raise InputError(f"run.begin: expected a step before the run's end at {config.total_steps}, got step {step}")
    other = place if (place / STATISTICS).is_file() else place.parents[1]
    if not (other / STATISTICS).is_file():
        raise InputError(f"run.begin: expected the run's {STATISTICS} in {other}, got none")
    take(other, folder, masked=step >= config.masked_steps)


def pin(run: Path, step: int, target: Path) -> bool:
    """Keep a run's checkpoint of a step, and what `begin` takes, in a folder of one's own: the run goes on and removes
    it. Files are linked where the file system can, else copied.

    Returns:
        False: the run has no such checkpoint.
    """
    if (target / HEAD).is_file():
        return True
    for folder in sorted((run / "train").glob("checkpoint_*"), reverse=True):
        if (folder / HEAD).is_file() and read_head(folder)["progress"]["step"] == step:
            unfinished = target.with_name(f"{target.name}.partial")
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(folder, unfinished, copy_function=_linked)
            take(run, unfinished, masked=True)
            unfinished.rename(target)
            return True
    return False


def take(run: Path, target: Path, masked: bool) -> None:
    """Tables of a run, and its encoder of the end of masked pretraining where it has one and it is asked for."""
    _linked(str(run / STATISTICS), str(target / STATISTICS))
    if masked and (run / MASKED_ENCODER).is_dir():
        shutil.copytree(run / MASKED_ENCODER, target / MASKED_ENCODER, dirs_exist_ok=True)


def _linked(source: str, target: str) -> str:
    """A file that nobody writes to, at another place."""
    if not os.path.exists(target):
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            shutil.copy2(source, target)
    return target
