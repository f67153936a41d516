"""Ray Tune of a search: which trials ASHA stops, and the bridge between Tune, Ray Train and the ledger."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before ray.tune is imported and a Ray is started, whose processes inherit them. Ctrl-C is ours to handle: Tune's own
# handler makes it look like an end.
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that failed reports no score
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # whose table is printed even at verbose=0

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from kmtr.config import RunConfig, from_json, override, to_json, typed
from kmtr.train import driver
from kmtr.train.trainer import release_orphans
from kmtr.types import KmtrError, last_line
from tune.ledger import Ledger, Trial

SCORE = "val/probe_r2"
ETA = 2
"""Reduction factor of ASHA (Li et al. 2020): the better half goes on at every rung; 4 is for hundreds of trials."""
RELEASE_EVERY_S = 2.0


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
        self._failed(number_of(trial), last_line(trial.get_error() or "its process was lost"))

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


def run_trials(config: RunConfig, ledger: Ledger, folder: Path, parent: str) -> None:
    """Let Ray Tune run all trials that have not ended, until each has ended or failed."""
    jobs = [job_of(config, trial, parent) for trial in ledger.trials if not trial.ended]
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


def job_of(config: RunConfig, trial: Trial, parent: str) -> dict[str, Any]:
    """Task of a trial's process. Its run is named after the search, whose name also fixes how it is scored."""
    changed = {**trial.values, "run.name": trial.name, "run.fresh": False}
    return {
        "number": trial.number,
        "config": to_json(override(config, changed)),
        "parent": parent,
        "tags": {f"search.{key}": typed(value) for key, value in trial.values.items()}
        | {"search.trial": str(trial.number), "search.stopped": "no"},
    }
