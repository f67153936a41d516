"""python tune/search.py RECIPE [search.trials=16 key=value ...]      search temperature, mask ratio and acceleration

Every trial is a pretraining run of its own (a child run in MLflow), scored by the ridge probe on held-out subjects.
Trials report at each checkpoint, so a search checkpoints exactly when it validates: train.eval_every decides for
both, and with it how often ASHA looks. From search.grace_steps on, ASHA stops a trial whose score is below the median
of those that came as far, and looks again at 2, 4, ... times as many steps. All trials are validated at
evaluate.accelerations, whatever R they train at. The temperature acts in alignment only: with search.grace_steps below
masked.steps, trials are also stopped before they reach it.

The same command resumes: finished and stopped trials are kept; more search.trials go on from the same ones.
run.fresh=true starts anew."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import ensure_packages  # noqa: F401  # first: goes on with the project's Python if need be

# Before ray.tune is imported. Ctrl-C is ours to handle: Tune's own handler makes it look like an end.
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that failed reports no score
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # whose table is printed even at verbose=0

import numpy as np
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from kmtr import tracking
from kmtr.cli import main, recipe_config
from kmtr.config import RunConfig, from_json, override, to_json
from kmtr.ray_start import start_ray
from kmtr.report.html import Table, png, text_table, write_report
from kmtr.report.style import COLOURS, INK
from kmtr.tracking.store import reaching
from kmtr.train import driver
from kmtr.types import PROBED, InputError, KmtrError
from tune import space

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kmtr.data.dataset.reader import Dataset

SCORE = "val/probe_r2"
STATE = "search.json"
ETA = 2
"""Reduction factor of ASHA (Li et al. 2020): the better half goes on at every rung; 4 is for hundreds of trials."""
RELEASE_EVERY_S = 2.0
MIN_HELD_OUT = 3
"""Held-out subjects below which the probe gives no score."""


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
    """All trials of a search, kept in ``search.json`` so that nothing that ended is run twice."""

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

    def update(self, number: int, **changes: Any) -> Trial:
        self.all[number] = replace(self.all[number], **changes)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps([asdict(trial) for trial in self.all], indent=1))
        os.replace(temporary, self.path)
        return self.all[number]

    def best(self) -> Trial | None:
        """The finished trial with the best last score."""
        scored = [t for t in self.trials if t.status == "finished" and math.isfinite(t.score)]
        return max(scored, key=lambda t: t.score, default=None)


def _trial(item: dict[str, Any]) -> Trial:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in item["values"].items()}
    return Trial(**item | {"values": values, "reports": tuple((step, score) for step, score in item["reports"])})


class Halving(ASHAScheduler):
    """ASHA on training steps. The last report of a trial stops nothing: what is left is only to export it."""

    def __init__(self, config: RunConfig, ended: Iterable[Trial]):
        last = config.total_steps
        grace = min(config.search.grace_steps, last)
        super().__init__(
            "step", SCORE, "max", max_t=last, grace_period=grace, reduction_factor=ETA, stop_last_trials=False
        )
        self.last_step = last
        self.stopped: set[int] = set()
        for trial in ended:  # the rungs of an earlier command, so that a search cut in two decides as a whole one
            for step, score in trial.reports:
                self._brackets[0].on_result(_Past(trial.name), step, score)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("step", 0) >= self.last_step:
            return str(TrialScheduler.CONTINUE)
        action = super().on_trial_result(tune_controller, trial, result)
        if action == TrialScheduler.STOP:
            self.stopped.add(number_of(trial))
        return str(action)


@dataclass(frozen=True)
class _Past:
    trial_id: str


class Desk(tune.Callback):
    """Writes what Tune tells into the ledger, and a line for people."""

    def __init__(self, ledger: Ledger, scheduler: Halving):
        self.ledger, self.scheduler = ledger, scheduler
        self._look_again = 0.0

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        known = self.ledger.all[number_of(trial)]
        if "step" not in result or SCORE not in result or int(result["step"]) <= known.step:
            return  # a failure; or a step trained again after a restart, or the end, which repeats the last report
        report = (int(result["step"]), float(result[SCORE]))
        self.ledger.update(known.number, reports=(*known.reports, report))
        print(f"  trial {known.number:>3}  step {report[0]:>6}   probe R² {report[1]:.3f}", flush=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        number, result = number_of(trial), trial.last_result
        if number in self.scheduler.stopped:
            self.ledger.update(number, status="stopped")
            print(f"  trial {number:>3}  stopped by ASHA", flush=True)
        elif "failure" in result:
            self._failed(number, result["failure"])
        else:
            self.ledger.update(number, status="finished", run_id=result["run_id"], encoder=result["encoder"])
            print(f"  trial {number:>3}  finished", flush=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        lines = [line.strip() for line in str(trial.get_error() or "its process was lost").splitlines() if line.strip()]
        self._failed(number_of(trial), lines[-1])

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        ended = self.scheduler.stopped or any(trial.status == "failed" for trial in self.ledger.trials)
        if ended and time.monotonic() > self._look_again:
            release_orphans()
            self._look_again = time.monotonic() + RELEASE_EVERY_S

    def _failed(self, number: int, reason: str) -> None:
        self.ledger.update(number, status="failed", reason=reason)
        print(f"  trial {number:>3}  failed: {reason}", flush=True)


def number_of(trial: Any) -> int:
    return int(trial.config["trial"]["number"])


def release_orphans() -> int:
    """Give back what dead Train controllers of this job reserved, and return how many reservations that were.

    Tune stops a trial by ending its process, and the Train controller inside dies with it, but a placement group
    lives until its job ends. Ray Train has a cleaner for this that asks the dashboard, which a local Ray does not
    run (and which it does not find where several Rays share a machine): the workers' CPUs then stay reserved and
    the next trial waits for ever. Who created a placement group is not in Ray's public table, so this reads the
    table below it.
    """
    import ray
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    kind = gcs_pb2.PlacementGroupTableData
    released = 0
    for raw in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = kind.FromString(raw)
        by_actor = set(group.creator_actor_id) - {0xFF}  # all ones: created by a driver
        if by_actor and group.creator_actor_dead and group.state != kind.REMOVED and group.creator_job_id.hex() == job:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            released += 1
    return released


def train_trial(params: dict[str, Any]) -> dict[str, Any]:
    """One trial, in a process of Tune's that only waits: it starts the run and passes its reports on."""
    job = params["trial"]
    os.environ.pop("MLFLOW_RUN_ID", None)  # else MLflow would write into that run instead of a child
    try:
        outcome = driver.fit(
            from_json(job["config"]),
            parent_id=job["parent"],
            quiet=True,
            callbacks=[TuneReportCallback()],
            tags=job["tags"],
        )
    except KmtrError as error:
        return {"failure": str(error)}
    known = {name: outcome.metrics[name] for name in ("step", SCORE) if name in outcome.metrics}
    return known | {"run_id": outcome.run_id, "encoder": outcome.encoder}


def run(words: list[str]) -> dict[str, Any]:
    os.environ.pop("MLFLOW_RUN_ID", None)
    config = recipe_config(words, __doc__ or "")
    config = override(config, {"train.checkpoint_every": config.train.eval_every})
    config, dataset = driver.resolve(config)
    check_probe(dataset)
    drawn = space.trials(config)
    name, folder = driver.run_folder(
        override(config, {"run.name": config.run.name or search_name(config, dataset.digest)}), dataset
    )
    ledger = Ledger(folder, name, drawn)
    best = ledger.best()
    if best is not None and all(trial.ended for trial in ledger.trials):
        print(f"search: {name} is finished, reused (run.fresh=true starts anew)")
        parent = tracking.find_run(config.tracking.uri, config.tracking.experiment, name)
        print(text_table(table(ledger)))
        return outcome_of(parent or "", ledger, best)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(to_json(config))
    start_ray()
    check_room(config)
    print(
        f"search: {name}: {len(ledger.trials)} trials of {config.total_steps} steps, {config.train.workers} worker(s) "
        f"each, {config.search.concurrent} at a time; score: held-out probe R² every {config.train.eval_every} steps",
        flush=True,
    )
    for trial in ledger.trials:
        print(
            f"  trial {trial.number:>3}  {shown(trial.values)}{'  ' + trial.status if trial.ended else ''}", flush=True
        )
    parent = tracking.open_run(
        config,
        name=name,
        resume_id=tracking.find_run(config.tracking.uri, config.tracking.experiment, name),
        tags={"search.trials": str(len(drawn))},
        besides=("search",),
    )
    tracking.log_dataset(config.tracking.uri, parent, Path(config.data.root).name, dataset.digest, config.data.root)
    began = time.perf_counter()
    status: Literal["FINISHED", "FAILED", "KILLED"] = "KILLED"
    try:
        tune_trials(config, ledger, folder, parent)
        close_children(config, ledger)
        status = "FINISHED" if ledger.best() is not None else "FAILED"
    except KeyboardInterrupt:
        close_children(config, ledger)
        raise
    except BaseException:
        status = "FAILED"
        raise
    finally:
        tracking.end_run(config.tracking.uri, parent, status)
    best = ledger.best()
    if best is None:
        reasons = [f"trial {t.number}: {t.reason}" for t in ledger.trials if t.status == "failed"]
        raise KmtrError(
            f"search {name}: no trial finished with a score; {(reasons or ['no probe on this dataset'])[0]}"
        )
    print(f"search: {name} ended after {time.perf_counter() - began:.0f} s")
    report = publish(config, ledger, folder, parent, best)
    print(text_table(table(ledger)))
    print(f"  best      trial {best.number}: {shown(best.values)}\n  encoder   {best.encoder}\n  report    {report}")
    return outcome_of(parent, ledger, best)


def check_probe(dataset: Dataset) -> None:
    """Whether trials can be scored on this dataset.

    Raises:
        InputError: too few held-out subjects, or none with a label that the probe predicts.
    """
    if dataset.rows("val") < MIN_HELD_OUT:
        raise InputError(
            f"data.root: a search scores held-out subjects, expected at least {MIN_HELD_OUT} in the split val, got "
            f"{dataset.rows('val')}; write the dataset with shards.split=hash"
        )
    if not any(dataset.labels.get(name) for name in PROBED):
        raise InputError(f"data.root: a search scores {', '.join(PROBED)}, expected one of them as a label, got none")


def check_room(config: RunConfig) -> None:
    """Whether all concurrent trials fit at once: one that holds workers while its readers wait would block the others.

    Raises:
        InputError: the cluster has too few CPUs or GPUs.
    """
    import ray

    train, data, count = config.train, config.data, config.search.concurrent
    have = ray.cluster_resources()
    wanted = {"CPU": count * train.workers.least * (train.cpus_per_worker + data.readers * data.read_cpus)}
    if train.device == "cuda" or (train.device == "auto" and have.get("GPU", 0)):
        wanted["GPU"] = float(count * train.workers.least)
    for kind, number in wanted.items():
        if number > have.get(kind, 0) + 1e-6:
            raise InputError(
                f"search.concurrent: {count} trial(s) of {train.workers} worker(s) with their readers need {number:g} "
                f"{kind}s, the cluster has {have.get(kind, 0):g}; lower search.concurrent or train.workers"
            )


def search_name(config: RunConfig, digest: str) -> str:
    """Recipe and hash of all that decides trials and scores; not how many trials, so that a search can be extended."""
    what = {
        "run": override(config, {"run.name": ""}).run_name(digest),
        "space": config.search.model_dump(mode="json", exclude={"trials", "concurrent"}),
        "score": [config.train.eval_every, config.train.eval_subjects, list(config.evaluate.accelerations)],
    }
    return f"search-{config.recipe}-{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]}"


def trial_config(config: RunConfig, trial: Trial) -> RunConfig:
    """Named after the search, since its name also fixes how trials are scored."""
    return override(config, {**trial.values, "run.name": trial.name, "run.fresh": False})


def tune_trials(config: RunConfig, ledger: Ledger, folder: Path, parent: str) -> None:
    """Let Ray Tune run all trials that have not ended, until each has ended or failed."""
    jobs = [
        {
            "number": trial.number,
            "config": to_json(trial_config(config, trial)),
            "parent": parent,
            "tags": {f"search.{key}": _text(value) for key, value in trial.values.items()}
            | {"search.trial": str(trial.number), "search.stopped": "no"},
        }
        for trial in ledger.trials
        if not trial.ended
    ]
    scheduler = Halving(config, [trial for trial in ledger.trials if trial.ended])
    tuner = tune.Tuner(
        tune.with_resources(train_trial, {"memory": 1}),  # a byte, since nothing is refused: it waits, the CPUs do not
        param_space={"trial": tune.grid_search(jobs)},
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            max_concurrent_trials=config.search.concurrent,
            reuse_actors=False,
            trial_name_creator=lambda trial: f"trial-{number_of(trial):02d}",
            trial_dirname_creator=lambda trial: f"trial-{number_of(trial):02d}",
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(folder), verbose=0, callbacks=[Desk(ledger, scheduler)]
        ),
    )
    tuner.fit()


def close_children(config: RunConfig, ledger: Ledger) -> None:
    """End the MLflow runs whose process Tune killed, after what their spools still hold is sent."""
    uri = config.tracking.uri
    for trial in ledger.trials:
        run_id = tracking.find_run(uri, config.tracking.experiment, trial.name)
        if run_id is None:
            continue
        ledger.update(trial.number, run_id=run_id)
        if trial.status == "finished":
            continue
        tracking.replay(Path(config.storage.root) / trial.name / "spool", uri)
        why = {"stopped": "asha", "waiting": "interrupted"}.get(trial.status)
        if why is not None:
            with reaching(uri) as mlflow:
                mlflow.set_tag(run_id, "search.stopped", why)
        tracking.end_run(uri, run_id, "FAILED" if trial.status == "failed" else "KILLED")


def publish(config: RunConfig, ledger: Ledger, folder: Path, parent: str, best: Trial) -> Path:
    """The result in MLflow's parent run, and as a page of its own beside the ledger."""
    page = write_report(
        folder / "search.html",
        title=f"Search {folder.name}",
        summary=f"Best: trial {best.number} with {shown(best.values)}, probe R² {best.score:.3f} on subjects of the "
        "validation split. It was chosen on these very subjects: evaluate it on the test split.",
        tables=[table(ledger)],
        figures=[("Score against each searched key; red: the best, open: it did not finish.", figure(ledger, best))],
        footer=f"MLflow run {parent}; best run {best.run_id}",
    )
    (folder / "search.png").write_bytes(png(figure(ledger, best)))
    with reaching(config.tracking.uri) as mlflow:
        for trial in ledger.trials:
            if math.isfinite(trial.score):
                mlflow.log_metric(parent, "trial/probe_r2", trial.score, step=trial.number)
        mlflow.log_metric(parent, "best/probe_r2", best.score)
        tags = {"best/trial": best.number, "best/run_id": best.run_id, "best/run_name": best.name}
        for key, value in (tags | {f"best/{key}": _text(value) for key, value in best.values.items()}).items():
            mlflow.set_tag(parent, key, str(value))
        for file in (page, folder / "search.png"):
            mlflow.log_artifact(parent, str(file))
    return page


def outcome_of(parent: str, ledger: Ledger, best: Trial) -> dict[str, Any]:
    return {
        "run_id": parent,
        "best": best.values,
        "best_run_id": best.run_id,
        "encoder": best.encoder,
        "metrics": {"probe_r2": best.score},
        "trials": len(ledger.trials),
    }


def table(ledger: Ledger) -> Table:
    """All trials, the best score first; what was stopped earlier cannot be above what finished."""
    order = sorted(
        ledger.trials, key=lambda t: (t.status != "finished", -t.step, -t.score if math.isfinite(t.score) else math.inf)
    )
    keys = list(ledger.trials[0].values)
    return Table(
        caption="Trials by probe R² on held-out subjects",
        columns=("trial", *keys, "probe R²", "step", "status"),
        rows=tuple(
            (t.number, *(_text(t.values[key]) for key in keys), t.score, t.step, t.reason[:60] or t.status)
            for t in order
        ),
        best=(("probe R²", "max"),) if len(order) > 1 else (),
    )


def figure(ledger: Ledger, best: Trial) -> Figure:
    """Score against each searched key."""
    from matplotlib.figure import Figure

    keys = list(best.values)
    scored = [t for t in ledger.trials if math.isfinite(t.score)]
    drawing = Figure(figsize=(3.1 * len(keys), 2.9), layout="constrained")
    for axes, key in zip(drawing.subplots(1, len(keys), sharey=True, squeeze=False)[0], keys, strict=True):
        for t in scored:
            colour = COLOURS[1] if t.number == best.number else COLOURS[0]
            full = t.status == "finished"
            axes.plot(_number(t.values[key]), t.score, "o", color=colour, markerfacecolor=colour if full else "none")
        if key == "align.temperature":
            axes.set_xscale("log")
            ends = [_number(t.values[key]) for t in scored]
            ticks = sorted({float(f"{x:.2g}") for x in np.geomspace(min(ends), max(ends), 4)})
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.set_xticks([], minor=True)
        axes.set_xlabel(key, fontsize=9, color=INK)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    drawing.axes[0].set_ylabel("probe R²", fontsize=9, color=INK)
    return drawing


def shown(values: dict[str, Any]) -> str:
    return "  ".join(f"{key}={_text(value)}" for key, value in values.items())


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _number(value: Any) -> float:
    return float(value[0]) if isinstance(value, tuple) else float(value)


if __name__ == "__main__":
    main(__doc__ or "", run)
