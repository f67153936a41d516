"""fit(config): a run from its settings to an exported encoder or model, on Ray Train; calling it again resumes."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int

from kmtr import tracking
from kmtr.card import write_card
from kmtr.config import RunConfig, to_json
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import statistics
from kmtr.files import replacing, write_atomic
from kmtr.ray_start import refuse_missing_gpu
from kmtr.train import checkpoint, start
from kmtr.train.folder import Outcome, begin, finish, finished, run_folder
from kmtr.train.handed import handed
from kmtr.train.loop import MASKED_ENCODER, train_worker
from kmtr.train.progress import Display
from kmtr.train.resolve import resolve
from kmtr.types import KmtrError, last_line

SPOOL = "spool"
"""Folder in the run's: records on their way to MLflow."""

log = logging.getLogger(__name__)


def fit(
    config: RunConfig,
    *,
    parent_id: str | None = None,
    quiet: bool = False,
    callbacks: list[Any] | None = None,
    tags: dict[str, str] | None = None,
) -> Outcome:
    """Train in one Ray Train run and one MLflow run. Ray must be up (kmtr.cli.start_ray).

    Args:
        parent_id: MLflow run that this one is a child of (a search).
        callbacks: of Ray Train's controller (a search's bridge to Tune).

    Raises:
        InputError: found before a worker starts.
        KmtrError: the run failed; its MLflow run has status FAILED.
    """
    import ray.train

    config, dataset = resolve(config)
    name, folder = run_folder(config, dataset)
    done = finished(folder)
    if done is not None:
        return done
    refuse_missing_gpu(config.train.device)
    begin(folder, config, dataset)
    write_atomic(folder / "config.json", to_json(config))
    rows = start.budget(config, dataset)
    tables = fitted_tables(config, dataset, folder, rows)
    uri = config.tracking.uri
    run_id = tracking.open_run(
        config,
        name=name,
        resume_id=tracking.find_run(uri, config.tracking.experiment, name),
        parent_id=parent_id,
        tags=tags,
    )
    tracking.log_dataset(uri, run_id, Path(config.data.root).name, dataset.digest, config.data.root)
    job: dict[str, Any] = {
        "config": to_json(config),
        "folder": str(folder),
        "resolved": handed(config, dataset, rows),
        "tables": {key: table.numpy() for key, table in tables.items()},
        "tracking": {"uri": uri, "run_id": run_id, "spool": str(folder / SPOOL)},
        "progress": f"progress-{name}-{os.getpid()}-{time.time_ns()}",
    }
    trainer = trainer_of(config, job, folder, callbacks or [])
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        with Display(job["progress"], config.total_steps, quiet) as display:
            result = trainer.fit()
        returned = _returned(name, result, display)
        encoder = _export(config, dataset, folder, returned, result.checkpoint, tables)
        _send_files(config, folder, run_id, encoder)
        metrics = {**returned["metrics"], "step": float(returned["step"])}
        if returned["stopped"]:
            metrics["task_stopped" if config.stage == "task" else "align_stopped"] = metrics["step"]
        outcome = Outcome(run_id, name, str(folder), str(encoder), metrics)
        finish(outcome)
        status = "FINISHED"
        return outcome
    except ray.train.TrainingFailedError as error:
        raise KmtrError(f"run {name}: {_reason(error)}") from error
    except KeyboardInterrupt:
        status = "KILLED"
        raise KmtrError(f"run {name}: interrupted; the same command goes on from its last checkpoint") from None
    finally:
        _end(uri, run_id, status, folder)


def _returned(name: str, result: Any, display: Display) -> dict[str, Any]:
    """The answer of the workers (`loop.Worker.run`).

    Raises:
        KmtrError: they failed together, which Ray takes for an end.
    """
    returned = result.return_value
    if not isinstance(returned, dict):
        raise KmtrError(f"run {name}: the workers ended without a result")
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
            checkpoint.export_model_from(Path(place), encoder, config, tables, start.trained_on(config, dataset))
        write_card(encoder)
        return encoder
    if returned["stopped"]:
        _copy_tree(folder / MASKED_ENCODER, encoder)
    else:
        with last.as_directory() as place:
            checkpoint.export_encoder_from(Path(place), encoder, config, tables)
    return encoder


def _send_files(config: RunConfig, folder: Path, run_id: str, encoder: Path) -> None:
    """Encoder and configuration to the run's artifacts, with all that is still to be sent."""
    spool = tracking.Spool(folder / SPOOL, config.tracking.uri, run_id)
    for file in sorted(encoder.iterdir()):
        spool.artifact(file, encoder.name)
    spool.artifact(folder / "config.json")
    if unsent := spool.close(60.0):
        log.warning("tracking: %d records could not be sent yet and are kept in %s", unsent, folder / SPOOL)


def _end(uri: str, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"], folder: Path) -> None:
    """End the MLflow run; one that failed sends first what its workers could not send any more."""
    try:
        if status != "FINISHED":
            tracking.replay(folder / SPOOL, uri)
        tracking.end_run(uri, run_id, status)
    except KmtrError as error:
        log.warning("tracking: %s", error)


def trainer_of(config: RunConfig, job: dict[str, Any], folder: Path, callbacks: list[Any]) -> Any:
    """The Ray Train trainer of a run: a fixed number of workers, or as many as share the batch and have room."""
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    train = config.train
    use_gpu = train.device == "cuda" or (train.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    resources = {"CPU": train.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    run = ray.train.RunConfig(
        name="train",
        storage_path=str(folder),
        failure_config=ray.train.FailureConfig(max_failures=train.max_failures),
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        callbacks=callbacks,
    )
    sizes = train.workers.sizes(config.data.global_batch)
    if len(sizes) == 1:
        fixed = ray.train.ScalingConfig(num_workers=sizes[0], use_gpu=use_gpu, resources_per_worker=resources)
        return TorchTrainer(train_worker, train_loop_config=job, scaling_config=fixed, run_config=run)
    from kmtr.train.elastic import ElasticTrainer

    elastic = ray.train.ScalingConfig(
        num_workers=(sizes[0], sizes[-1]),
        use_gpu=use_gpu,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=train.resize_every_s,
    )
    return ElasticTrainer(
        train_worker,
        train_loop_config=job,
        scaling_config=elastic,
        run_config=run,
        sizes=sizes,
        progress=job["progress"],
    )


def fitted_tables(
    config: RunConfig, dataset: Dataset, folder: Path, rows: Int[np.ndarray, " chosen"] | None = None
) -> dict[str, torch.Tensor]:
    """Normalisation statistics of the run, fitted once and kept beside its checkpoints.

    Args:
        rows: whose labels count (`start.budget`); k-space, which needs no labels, is that of all training subjects.
    """
    from safetensors.torch import load_file, save_file

    path = folder / "statistics.safetensors"
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


def _reason(error: BaseException) -> str:
    """The innermost reason of a failed training as one line."""
    failures = getattr(error, "worker_failures", None) or {}
    inner: BaseException = next(iter(failures.values()), error)
    return last_line(getattr(inner, "base_exc", inner))
