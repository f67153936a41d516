"""fit(config): a run from its settings to an exported encoder or model, on Ray Train; calling it again resumes."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from kmtr import tracking
from kmtr.card import write_card
from kmtr.config import RunConfig, to_json
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import statistics
from kmtr.files import replacing, write_atomic
from kmtr.owner import owning
from kmtr.train import branch, checkpoint, room, start
from kmtr.train.described import note
from kmtr.train.folder import (
    IMAGE_ENCODER,
    MASKED_ENCODER,
    STATISTICS,
    Outcome,
    begin,
    by_setting,
    finish,
    finished,
    run_folder,
)
from kmtr.train.handed import handed
from kmtr.train.progress import Display
from kmtr.train.resolve import resolve
from kmtr.types import InputError, KmtrError, StoppedError, redact, with_kind

SPOOL = "spool"
"""Folder in the run's: records on their way to MLflow."""
SEND_S = 60.0
"""Time that the end of a command waits for MLflow."""

NODES_S = 5.0
"""Time in which the readings of the nodes are sent, on which no number depends."""

log = logging.getLogger(__name__)


def fit(
    config: RunConfig,
    *,
    parent_id: str | None = None,
    quiet: bool = False,
    callbacks: list[Any] | None = None,
    tags: dict[str, str] | None = None,
    title: str = "",
    in_place: bool = False,
) -> Outcome:
    """Train in one Ray Train run and one MLflow run. Ray must be up (kmtr.cli.start_ray).

    Args:
        in_place: this process, a Ray actor's, is the run's one worker (`kmtr.train.in_place`), without Ray Train.
        parent_id: MLflow run that this one is a child of (a search).
        callbacks: of Ray Train's controller (a search's bridge to Tune).
        title: its name in MLflow; empty: the run's own.

    Raises:
        InputError: found before a worker starts.
        StoppedError: it was asked to stop (Ctrl-C, SIGTERM), and saved; its MLflow run has status KILLED.
        KmtrError: the run failed; its MLflow run has status FAILED. Or another command is at work on it.
    """
    config, dataset = resolve(config)
    name, folder = run_folder(config, dataset)
    done = finished(folder)
    if done is not None:
        return settled(done, config)
    room.refuse_missing_gpu(config.train.device)
    with owning(folder, f"run {name}"):
        done = finished(folder)  # by the one that was waited for
        return done or _fit(
            config, dataset, name, folder, _Job(parent_id, quiet, callbacks or [], tags, title, in_place)
        )


@dataclass(frozen=True)
class _Job:
    """Arguments of `fit` but the configuration."""

    parent_id: str | None
    quiet: bool
    callbacks: list[Any]
    tags: dict[str, str] | None
    title: str
    in_place: bool


def _fit(config: RunConfig, dataset: Dataset, name: str, folder: Path, asked: _Job) -> Outcome:
    """`fit` of a run that is not finished and is ours."""
    import ray.train

    from kmtr.train import in_place, trainer

    branch.begin(config, folder)  # first: what it refuses leaves the name free
    begin(folder, config, dataset)
    write_atomic(folder / "config.json", redact(to_json(config)))
    rows = start.budget(config, dataset)
    tables = fitted_tables(config, dataset, folder, rows)
    run_id = _opened(config, dataset, name, folder, asked)
    job: dict[str, Any] = {
        "config": to_json(config),
        "folder": str(folder),
        "resolved": handed(config, dataset, rows),
        "tables": {key: table.numpy() for key, table in tables.items()},
        "tracking": {"uri": config.tracking.uri, "run_id": run_id, "spool": str(folder / SPOOL)},
        "progress": f"progress-{name}-{os.getpid()}-{time.time_ns()}",
    }
    status: tracking.Status | None = "FAILED"
    try:
        with Display(
            job["progress"], config.total_steps, asked.quiet, config.train.silent_s, config.train.hang_s
        ) as display:
            result: Any
            try:
                if asked.in_place:
                    result = in_place.fit(config, job, folder)
                else:
                    result = trainer.fit(config, job, folder, asked.callbacks, display.line)
            except ray.train.TrainingFailedError as error:
                why = display.own_failure() or by_setting(trainer.reason(error), folder)
                raise KmtrError(f"run {name}: {why}") from error
            returned = _returned(name, result, display)
        if returned.get("paused"):
            status = None
            return Outcome(run_id, name, str(folder), "", {**returned["metrics"], "step": float(returned["step"])})
        encoder = _export(config, dataset, folder, returned, result.checkpoint, tables)
        metrics = {**returned["metrics"], "step": float(returned["step"])}
        if returned["stopped"]:
            metrics["task_stopped" if config.stage == "task" else "align_stopped"] = metrics["step"]
        outcome = Outcome(run_id, name, str(folder), str(encoder), metrics)
        _stage(config, run_id, folder, [*sorted(encoder.iterdir()), folder / "config.json"])
        finish(outcome)
        status = "FINISHED"
        return outcome
    except StoppedError:
        status = "KILLED"
        raise
    except OSError as error:  # what the driver itself writes: the exported model, the result
        if error.errno != errno.ENOSPC:
            raise
        raise KmtrError(f"run {name}: {by_setting(with_kind(error), folder)}") from error
    except KeyboardInterrupt:
        status = "KILLED"
        raise StoppedError(f"run {name}: interrupted; the same command goes on from its last checkpoint") from None
    finally:
        _end(config, run_id, status, folder)


def _opened(config: RunConfig, dataset: Dataset, name: str, folder: Path, asked: _Job) -> str:
    """Id of the run in MLflow, opened. One that was opened before goes on where MLflow does not answer.

    Raises:
        KmtrError: it does not answer, and the run is new.
    """
    uri, known = config.tracking.uri, tracking.owner(folder / SPOOL)
    try:
        run_id = tracking.open_run(
            config,
            name=name,
            resume_id=tracking.find_run(uri, config.tracking.experiment, name),
            parent_id=asked.parent_id,
            tags=asked.tags,
            title=asked.title,
            note=note(config, dataset, name, (asked.tags or {}).get("command") or tracking.command()),
        )
        tracking.log_dataset(uri, run_id, Path(config.data.root).name, dataset.digest, config.data.root)
    except InputError:
        raise
    except KmtrError as error:
        if known is None:
            raise
        log.warning("tracking: the run goes on without its store, for which %s keeps all: %s", folder / SPOOL, error)
        return known
    return run_id


def settled(done: Outcome, config: RunConfig) -> Outcome:
    """The outcome of a finished run; what MLflow does not have of it yet is sent, which is said."""
    spool = Path(done.folder) / SPOOL
    tracking.send_rest(Path(done.folder), config.tracking.uri, NODES_S)
    if tracking.owner(spool) and (tracking.unsent(spool) or not tracking.ended(spool)):
        left = tracking.send(spool, config.tracking.uri, "FINISHED", SEND_S)
        _say_unsent(left, spool) if left else log.warning("tracking: %s: MLflow has all of it now", done.name)
    return done


def _returned(name: str, result: Any, display: Display) -> dict[str, Any]:
    """The answer of the workers (`loop.Worker.run`).

    Raises:
        KmtrError: they failed together, which Ray takes for an end.
    """
    returned = result.return_value
    if not isinstance(returned, dict):
        raise KmtrError(f"run {name}: the workers ended without a result")
    if "interrupted" in returned:
        step = returned["step"]
        raise StoppedError(f"run {name}: stopped at step {step}, which is saved; the same command goes on from there")
    if "error" in returned:
        raise KmtrError(f"run {name}: {display.first_failure() or returned['error']}")
    if result.checkpoint is None:
        raise KmtrError(f"run {name}: it ended without a checkpoint")
    return returned


def _export(
    config: RunConfig,
    dataset: Dataset,
    folder: Path,
    returned: dict[str, Any],
    last: Any,
    tables: dict[str, torch.Tensor],
) -> Path:
    """The folder left: the encoder of the last checkpoint, or where the guard stopped, of masked pretraining; of
    training on labels the model with its card, best or last (`task.keep`), which the last checkpoint both has.
    """
    encoder = folder / ("model" if config.stage == "task" else "encoder")
    if config.stage == "task":
        with last.as_directory() as place:
            checkpoint.check_whole(Path(place), 0, 1)
            checkpoint.export_model_from(Path(place), encoder, config, tables, start.trained_on(config, dataset))
        write_card(encoder)
        return encoder
    with last.as_directory() as place:
        checkpoint.check_whole(Path(place), 0, 1)
        lost = returned["stopped"] and config.align.train_image_encoder  # with the alignment that the guard ended
        if config.masked_steps and config.masked.image_weight and not lost:
            checkpoint.export_encoder_from(Path(place), folder / IMAGE_ENCODER, config, tables, "image")
        if returned["stopped"]:
            _copy_tree(folder / MASKED_ENCODER, encoder)
        else:
            checkpoint.export_encoder_from(Path(place), encoder, config, tables)
    return encoder


def _stage(config: RunConfig, run_id: str, folder: Path, files: Sequence[Path]) -> None:
    """Put files into the spool, before the run counts as finished: what is in it is sent, whatever happens next."""
    spool = tracking.Spool(folder / SPOOL, config.tracking.uri, run_id, ships=False)
    for file in files:
        spool.artifact(file, "" if file.parent == folder else file.parent.name)
    spool.close(0.0)


def _end(config: RunConfig, run_id: str, status: tracking.Status | None, folder: Path) -> None:
    """Send what the spool holds, and then end the MLflow run; None: it only pauses."""
    try:
        spool = tracking.Spool(folder / SPOOL, config.tracking.uri, run_id)
    except (KmtrError, OSError) as error:
        log.warning("tracking: %s", error)
        return
    if status is not None:
        spool.end(status)
    tracking.send_rest(folder, config.tracking.uri, NODES_S)
    if left := spool.close(SEND_S):
        _say_unsent(left, folder / SPOOL)


def _say_unsent(left: int, spool: Path) -> None:
    log.warning(
        "tracking: MLflow lacks %d records and the end of this run, which %s keeps: the same command sends them, or "
        "python jobs/send.py",
        left,
        spool,
    )


def fitted_tables(
    config: RunConfig, dataset: Dataset, folder: Path, rows: Int[np.ndarray, " chosen"] | None = None
) -> dict[str, torch.Tensor]:
    """Normalisation statistics of the run, fitted once and kept beside its checkpoints.

    Args:
        rows: whose labels count (`start.budget`); k-space, which needs no labels, is that of all training subjects.
    """
    from safetensors.torch import load_file, save_file

    path = folder / STATISTICS
    if path.is_file():
        tables = load_file(path)
        return tables | {"static_mean": torch.view_as_complex(tables["static_mean"])}
    reader = dataset.reader("train", config.data)
    begun = start.tables(config)
    fitted = statistics.tables(config, reader) if begun is None else begun
    fitted |= start.task_tables(config, reader, fitted, rows)
    stored = {k: (torch.view_as_real(v) if v.is_complex() else v).contiguous() for k, v in fitted.items()}
    with replacing(path) as temporary:
        save_file(stored, temporary)
    return fitted


def _copy_tree(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
