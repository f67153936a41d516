"""Parts that studies share: trainings, tasks over the cluster, and where their results go."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from kmtr import tracking
from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.files import write_atomic
from kmtr.owner import owning
from kmtr.progress import Bar
from kmtr.ray_start import start_ray
from kmtr.report.html import Table, png, text_table, write_report
from kmtr.report.intervals import IntervalTable
from kmtr.train import folder as runs
from kmtr.train.room import refuse_missing_gpu, uses_gpus
from kmtr.types import KmtrError, StoppedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def ended(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], at_once: int = 0, **wanted: Any
) -> Iterator[Any]:
    """Results of `function` called with every job's arguments, as Ray tasks, in the order in which they end.
    Ray must be up (kmtr.ray_start.start_ray).

    Args:
        at_once: tasks that run side by side; 0: as many as the cluster has room for.
        wanted: options of the tasks (num_cpus, num_gpus, max_retries).

    Raises:
        ray.exceptions.RayError: of the first task that failed; the others are cancelled.
    """
    import ray

    task, left = ray.remote(**wanted)(function), list(jobs)
    running: list[Any] = []
    try:
        while left or running:
            while left and (not at_once or len(running) < at_once):
                running.append(task.remote(*left.pop(0)))
            ready, running = ray.wait(running)
            yield from ray.get(ready)
    finally:
        for other in running:
            ray.cancel(other)


def each(function: Callable[..., None], jobs: Sequence[tuple[Any, ...]], what: str, device: str) -> None:
    """Call `function` with every job's arguments, as Ray tasks of one core (and one GPU) each, with a bar.

    Args:
        device: `train.device`, or ``cpu`` for a function that needs none; within a task `machine.device` says the rest.

    Raises:
        InputError: it asks for GPUs, and the cluster has none.
        KmtrError: the first job that failed says why; the others are cancelled.
    """
    if not jobs:
        return
    start_ray()
    from ray.exceptions import RayError

    refuse_missing_gpu(device)
    bar = Bar(what)
    try:
        for done, _ in enumerate(ended(function, jobs, num_cpus=1, num_gpus=int(uses_gpus(device))), 1):
            bar(done, len(jobs))
    except RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise KmtrError(f"{what}: {lines[-1].strip()}") from None


def named(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A run of a study: changed. Where the study was given a name, it has that and a hash of its settings for its own:
    a run of other settings is never taken for it.
    """
    changed = override(config, {**changes, "run.name": ""})
    if not config.run.name:
        return changed
    return override(changed, {"run.name": f"{config.run.name}-{changed.run_name('').rpartition('-')[2]}"})


def finished(config: RunConfig, dataset: Dataset) -> runs.Outcome | None:
    """The outcome of the run of a configuration where it is finished."""
    return runs.finished(runs.run_folder(config, dataset)[1])


def fit(config: RunConfig, dataset: Dataset, parent: str, what: str, in_place: bool = False) -> runs.Outcome:
    """The outcome of a run of a study, which is trained where it is not finished; Ray is started for that alone.

    Args:
        parent: the study's MLflow run.
        what: the run in words, for a line on the screen.
        in_place: by this process (`driver.fit`).
    """
    from kmtr.train import driver

    done = finished(config, dataset)
    if done is not None:
        print(f"study: {what}: {done.name} is finished, reused", flush=True)
        return driver.settled(done, config)
    print(f"study: {what}", flush=True)
    start_ray()
    return driver.fit(config, parent_id=parent, in_place=in_place)


def clock(*outcomes: runs.Outcome) -> str:
    """Metric by which the speeds of runs are compared: by the processor's time where all logged that (on CPUs, where
    other work would slow down one run and not the other), else by the clock.
    """
    logged = (runs.speeds(Path(one.folder), runs.SPEED_CPU) for one in outcomes)
    return runs.SPEED_CPU if all(logged) else runs.SPEED


def rate(outcome: runs.Outcome, first: int, last: int, metric: str = runs.SPEED) -> float:
    """Subjects/s that a run logged in steps ]first, last]: the median; NaN: nothing was logged there."""
    values = sorted(value for step, value in runs.speeds(Path(outcome.folder), metric) if first < step <= last)
    return values[len(values) // 2] if values else float("nan")


def publish(
    config: RunConfig,
    folder: Path,
    name: str,
    run_id: str,
    tables: Sequence[Table | IntervalTable],
    figure: Figure,
    caption: str,
    summary: str,
    results: Mapping[str, Any],
    curves: Mapping[int, Mapping[str, float]],
    more: Mapping[str, tuple[str, Figure]] = MappingProxyType({}),
    files: Sequence[Path] = (),
    details: Sequence[IntervalTable] = (),
) -> dict[str, Any]:
    """Print the tables, keep them (those of intervals as CSV too) with the figure, the results and a report, and tell
    MLflow.

    A study goes on under its name with more seeds or questions, and says its numbers anew where they have changed.

    Args:
        folder: the study's.
        results: content of ``results.json``, null where a number is unknown.
        curves: step (number of labels, or R) -> metrics of the MLflow run.
        more: name of the file -> caption and figure, which come after the first one.
        files: others of the folder, for MLflow.
        details: tables that are not printed.

    Returns:
        MLflow run, report and results, for the last line.
    """
    text = "\n\n".join(text_table(_readable(one)) for one in tables)
    print(f"\n{text}")
    uri = config.tracking.uri
    pictures = {where: (told, png(drawn)) for where, (told, drawn) in {"figure.png": (caption, figure), **more}.items()}
    for where, (_, picture) in pictures.items():
        (folder / where).write_bytes(picture)
    (folder / "tables.txt").write_text(text)
    sheets = {f"{one.name}.csv": one.csv() for one in (*tables, *details) if isinstance(one, IntervalTable)}
    for where, content in sheets.items():
        write_atomic(folder / where, content)
    write_atomic(folder / "results.json", json.dumps(known(results), indent=1, allow_nan=False))
    data = Dataset.open(config.data)
    report = write_report(
        folder / "report.html",
        title=f"k-MTR: {name}",
        summary=summary,
        tables=[_readable(one) for one in (*tables, *details)],
        figures=[*pictures.values()],
        footer=f"run {run_id}, data {data.digest[:12]}, torch {torch.__version__}, "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    )
    said = hashlib.sha256(json.dumps(curves, sort_keys=True).encode()).hexdigest()[:8]
    spool = tracking.Spool(folder / f"spool-{said}", uri, run_id)  # one spool says each (name, step) once
    for step, metrics in curves.items():
        spool.metrics(step, metrics)
    for path in (report, folder / "results.json", *(folder / where for where in (*pictures, *sheets)), *files):
        spool.artifact(path, "study")
    if spool.close(30.0):
        print(f"tracking: not everything could be sent yet; kept in {spool.folder}")
    print(f"report: {report}\nMLflow: {tracking.where(uri)}")
    return {"run_id": run_id, "report": str(report), "results": str(folder / "results.json")}


def _readable(table: Table | IntervalTable) -> Table:
    return table.table() if isinstance(table, IntervalTable) else table


def known(value: Any) -> Any:
    """A copy with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: known(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [known(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def open_run(config: RunConfig, dataset: Dataset, name: str) -> Iterator[str]:
    """The study's MLflow run, parent of its trainings; found again by name. It ends as what is within ends.

    Raises:
        KmtrError: another command is at work on it.
    """
    folder = Path(config.storage.root) / "study" / name
    with owning(folder, f"study {name}"), _open_run(config, dataset, name) as run_id:
        yield run_id


@contextlib.contextmanager
def _open_run(config: RunConfig, dataset: Dataset, name: str) -> Iterator[str]:
    uri = config.tracking.uri
    run_id = tracking.open_run(
        config,
        name=name,
        resume_id=tracking.find_run(uri, config.tracking.experiment, name),
        besides=("study", "evaluate"),
    )
    tracking.log_dataset(uri, run_id, Path(config.data.root).name, dataset.digest, config.data.root)
    try:
        yield run_id
    except BaseException as error:
        with contextlib.suppress(KmtrError):  # the store is gone: what ended the study is what must be told
            failed = isinstance(error, Exception) and not isinstance(error, StoppedError)
            tracking.end_run(uri, run_id, "FAILED" if failed else "KILLED")
        raise
    tracking.end_run(uri, run_id, "FINISHED")
