"""One MLflow run per training: opened and ended by the driver, found again by its name. Nothing here is global state.

Every function takes the store's URI (`tracking_uri(config)`) or the configuration that it follows from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from kmtr.config import RunConfig, run_keys
from kmtr.tracking.origin import started_by, versions
from kmtr.tracking.store import SERVERS, artifact_location, local_path, reaching, redact, tracking_uri
from kmtr.types import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""End of a run, by MLflow."""

NAME_TAG = "kmtr.run_name"
NOTE_TAG = "mlflow.note.content"
VALUE_LIMIT, TAG_LIMIT = 6000, 8000
"""Characters of a parameter and of a tag, by MLflow."""
BATCH_LIMIT = 100
"""Parameters or tags in one call, by MLflow."""
DIGEST_LIMIT = 36
"""Characters of a dataset's digest, by MLflow: a SHA-256 is cut to its first 36 (144 bits)."""


def open_run(
    config: RunConfig,
    *,
    name: str,
    resume_id: str | None = None,
    parent_id: str | None = None,
    tags: dict[str, str] | None = None,
    title: str = "",
    note: str = "",
    besides: Iterable[str] = (),
) -> str:
    """Creates the run, or reopens `resume_id`: status RUNNING, configuration as parameters, versions as tags.

    A parameter cannot be changed in MLflow. Where a resumed run has another value (workers, storage: all that does not
    change the numbers) the first stays the parameter and the new one becomes the tag ``resumed.<key>``.

    Args:
        name: by which `find_run` finds it.
        title: that MLflow shows; empty: the name.
        note: description of a new run, Markdown.
        besides: sections of the configuration that are logged beside what training reads.

    Returns:
        The run id.

    Raises:
        InputError: a name with quotes, or a run or experiment that was deleted in MLflow.
        KmtrError: the store cannot be reached.
    """
    _check_name(name)
    uri = tracking_uri(config)
    with reaching(uri) as mlflow:
        from mlflow.entities import Param, RunTag

        if resume_id is None:
            experiment = _experiment(mlflow, config, uri)
            parent = {"mlflow.parentRunId": parent_id} if parent_id else {}
            run = mlflow.create_run(experiment, run_name=title or name, tags={NAME_TAG: name, **parent})
        else:
            run = mlflow.get_run(resume_id)
            if run.info.lifecycle_stage != "active":
                raise InputError(f"run {name}: deleted in MLflow; restore it there, or start anew with run.fresh=true")
            mlflow.update_run(resume_id, status="RUNNING")
        run_id: str = run.info.run_id

        wanted = {key: _text(value) for key, value in run_keys(config, besides).items()}
        known = run.data.params
        new = {key: value for key, value in wanted.items() if key not in known}
        changed = {f"resumed.{key}": value for key, value in wanted.items() if known.get(key, value) != value}
        marks = {
            "recipe": config.recipe,
            "stage": config.stage,
            **versions(),
            **started_by(),
            **changed,
            **(tags or {}),
        }
        if resume_id is None and note:
            marks[NOTE_TAG] = note[:TAG_LIMIT]
        for part in _batches(new):
            mlflow.log_batch(run_id, params=[Param(key, value) for key, value in part.items()])
        for part in _batches(marks):
            mlflow.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in part.items()])
    return run_id


def find_run(uri: str, experiment: str, name: str) -> str | None:
    """Id of the newest run that `open_run` opened under this name; None: there is none.

    Raises:
        InputError: a name with quotes.
        KmtrError: the store cannot be reached.
    """
    _check_name(name)
    with reaching(uri) as mlflow:
        found = mlflow.get_experiment_by_name(experiment)
        if found is None:
            return None
        runs = mlflow.search_runs(
            [found.experiment_id],
            f"tags.`{NAME_TAG}` = '{name}'",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
    return runs[0].info.run_id if runs else None


def recorded(uri: str, run_id: str, names: Iterable[str]) -> dict[str, list[tuple[int, float]]]:
    """Points of these metrics in the store: name -> (step, value) of every point, in order of steps.

    Raises:
        KmtrError: the store cannot be reached.
    """
    with reaching(uri) as mlflow:
        return {name: sorted((p.step, p.value) for p in mlflow.get_metric_history(run_id, name)) for name in names}


def end_run(uri: str, run_id: str, status: Status) -> None:
    """Ends the run with this status, now.

    Raises:
        KmtrError: the store cannot be reached; the run then stays RUNNING there.
    """
    with reaching(uri) as mlflow:
        mlflow.set_terminated(run_id, status)


def log_dataset(uri: str, run_id: str, name: str, digest: str, source: str, schema_json: str = "{}") -> None:
    """Notes the dataset as an input of the run: what it learned from, by the hash of the manifest.

    Args:
        digest: hash of the manifest; MLflow keeps its first 36 characters, the source field holds it whole.
        source: folder or URI of the dataset, never of a patient's file.
        schema_json: JSON text; MLflow's dataset view shows it.

    Raises:
        KmtrError: the store cannot be reached.
    """
    with reaching(uri) as mlflow:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        dataset = Dataset(
            name=name,
            digest=digest[:DIGEST_LIMIT],
            source_type="local" if local_path(source) else source.partition(":")[0],
            source=json.dumps({"uri": redact(source), "manifest": digest}),
            schema=schema_json,
        )
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
        try:
            mlflow.log_inputs(run_id, inputs)
        except MlflowException:  # two runs noted a new dataset at once, and the other one's row is there now
            mlflow.log_inputs(run_id, inputs)


def _check_name(name: str) -> None:
    if not name or any(c in name for c in "'\"`\n"):
        raise InputError(f"run.name: expected a name without quotes, got {name!r}")


def _experiment(mlflow: MlflowClient, config: RunConfig, uri: str) -> str:
    """Id of the configured experiment, created where it is missing; several processes may do so at once."""
    from mlflow.exceptions import MlflowException

    name = config.tracking.experiment
    found = mlflow.get_experiment_by_name(name)
    if found is None:
        location = artifact_location(config, uri)
        try:
            return mlflow.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            found = mlflow.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
    if found.lifecycle_stage != "active":
        raise InputError(
            f"tracking.experiment: {name!r} was deleted in MLflow; restore it there, or choose another name"
        )
    if uri.partition(":")[0] not in SERVERS and found.artifact_location.startswith("mlflow-artifacts:"):
        log.warning("experiment %r was made by an MLflow server: its files need that server's address", name)
    return found.experiment_id


def _text(value: object) -> str:
    """A parameter as MLflow takes it: without passwords, within the limit, `,` between items as on a command line."""
    if isinstance(value, dict):
        value = " ".join(f"{key}={each}" for key, each in value.items())
    text = redact(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return text if len(text) <= VALUE_LIMIT else text[: VALUE_LIMIT - 3] + "..."


def _batches(items: dict[str, str]) -> list[dict[str, str]]:
    keys = list(items)
    return [{key: items[key] for key in keys[i : i + BATCH_LIMIT]} for i in range(0, len(keys), BATCH_LIMIT)]
