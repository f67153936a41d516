"""Ray Tune of a search: which runs begin, which ASHA stops, and the bridge between Tune, Ray Train and the ledger."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Before ray.tune is imported and a Ray is started, whose processes inherit them. Ctrl-C is ours to handle: Tune's own
# handler makes it look like an end.
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that failed reports no score
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"  # 20 lines where a node is lost, of which `Desk` tells in one
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # whose table is printed even at verbose=0

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from kmtr import tracking
from kmtr.config import RunConfig, from_json, override, to_json, typed
from kmtr.train import choice, driver, guard
from kmtr.train.trainer import release_orphans
from kmtr.types import KmtrError, last_line
from tune import pbt
from tune.ledger import FAILED, FINISHED, STOPPED, WAITING, Trial
from tune.plan import Plan, settings
from tune.screen import Screen
from tune.space import shown

RELEASE_EVERY_S = 2.0
LOST = 3
"""Losses of a trial's process, with its node, that a trial survives; what comes again is an error of the run's own."""


def score_of(config: RunConfig) -> str:
    """Metric by which the trials compare: of a task's validation or of the probe, never a loss, whose scale a
    temperature or mask ratio changes.
    """
    return choice.SCORE if config.stage == "task" else guard.MEAN


class Asking(Searcher):
    """Tune's way to ask a plan which run comes next."""

    def __init__(self, following: Callable[[set[str]], Trial | None], plan: Plan, parent: str, until: int = 0):
        super().__init__()
        self.following, self.plan, self.parent, self.until = following, plan, parent, until
        self.begun: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        runs = self.plan.ledger.runs
        if self.plan.hopeless:  # unless one that goes on reports something after all; what is final can't be taken back
            return None if any(runs[name].status == WAITING for name in self.begun) else Searcher.FINISHED
        run = self.following(self.begun)
        if run is None:
            return Searcher.FINISHED
        self.begun.add(run.name)
        return {"trial": job_of(self.plan.space.config, run, self.parent, self.until)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The ledger knows already."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing of it is needed: the ledger is the state of a search."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on from its ledger")


class Halving(ASHAScheduler):
    """ASHA (Li et al., MLSys 2020) on training steps, with one bracket, whose rungs know trials by their runs' names.
    The last report of a trial stops nothing: what is left is only to export it.

    Args:
        before: trials with their reports of earlier commands, so that a search cut in two decides as a whole one.
    """

    def __init__(self, config: RunConfig, before: Iterable[Trial]):
        last, score = config.total_steps, score_of(config)
        grace = min(config.search.grace_steps, last)
        super().__init__(
            "step", score, "max", max_t=last, grace_period=grace, reduction_factor=config.search.eta,
            stop_last_trials=False,
        )  # fmt: skip
        self.last_step, self.score = last, score
        self.stopped: set[str] = set()
        for trial in before:
            whole = trial.status == FINISHED  # whose last report was looked at by no rung
            for step, value in trial.reports[:-1] if whole else trial.reports:
                self._brackets[0].on_result(_Named(trial.name), step, value)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """There is one bracket."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        step = result.get("step", 0)
        if step >= self.last_step or result.get("ended") or self.score not in result:
            return str(TrialScheduler.CONTINUE)
        action = self._brackets[0].on_result(_Named(name_of(trial)), step, result[self.score])
        if action == TrialScheduler.STOP:
            self.stopped.add(name_of(trial))
        return str(action)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Its reports are known."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Its reports are known."""


@dataclass(frozen=True)
class _Named:
    trial_id: str


class Desk(tune.Callback):
    """Writes what Tune tells into the ledger, and shows it."""

    def __init__(self, plan: Plan, stopped: set[str], screen: Screen):
        self.plan, self.stopped, self.screen = plan, stopped, screen
        self.ledger, self.score = plan.ledger, score_of(plan.space.config)
        self.began: dict[str, float] = {}
        self._look_again = 0.0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        name = name_of(trial)
        self.began.setdefault(name, time.monotonic())
        self.screen.begins(self.ledger.runs[name])

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        known = self.ledger.runs[name_of(trial)]
        if "step" not in result or self.score not in result or int(result["step"]) <= known.step:
            return  # a failure; or a step trained again after a restart, or the end, which repeats the last report
        report = (int(result["step"]), float(result[self.score]))
        self.screen.reports(self.ledger.update(known.name, reports=(*known.reports, report)))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        name, result = name_of(trial), trial.last_result
        if name in self.stopped:
            self._ends(name, status=STOPPED, run_id="")  # MLflow is to be told
        elif "failure" in result:
            self._ends(name, status=FAILED, reason=result["failure"])
        elif "paused" in result:
            self.on_trial_result(iteration, trials, trial, result)  # where the report of its last step was lost
            self._ends(name)
        else:
            left = {key: result[key] for key in ("run_id", "encoder")}
            self._ends(name, status=FINISHED, result=result.get("result"), **left)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.screen.lost(self.ledger.runs[name_of(trial)])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._ends(name_of(trial), status=FAILED, reason=last_line(trial.get_error() or "its process was lost"))

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        ended = self.stopped or any(run.status == FAILED for run in self.ledger.runs.values())
        if ended and time.monotonic() > self._look_again:
            release_orphans()
            self._look_again = time.monotonic() + RELEASE_EVERY_S

    def _ends(self, name: str, **what: Any) -> None:
        seconds = self.ledger.runs[name].seconds + time.monotonic() - self.began.pop(name, time.monotonic())
        self.screen.ends(self.ledger.update(name, **{"seconds": round(seconds, 1), "reason": "", **what}))


def name_of(trial: Any) -> str:
    return str(trial.config["trial"]["name"])


def train_trial(params: dict[str, Any]) -> dict[str, Any]:
    """One run, in a process of Tune's that only waits: it starts the run and passes its reports on."""
    job = params["trial"]
    os.environ.pop("MLFLOW_RUN_ID", None)  # else MLflow would write into that run instead of a child
    config = from_json(job["config"])
    try:
        outcome = driver.fit(
            config,
            parent_id=job["parent"],
            quiet=True,
            callbacks=[TuneReportCallback()],
            tags=job["tags"],
            title=job["title"],
        )
    except KmtrError as error:
        return {"failure": str(error)}
    score = outcome.metrics.get(score_of(config))
    if not outcome.encoder:
        paused = {"step": outcome.metrics["step"], "paused": True}
        return paused | ({} if score is None else {score_of(config): float(score)})
    known = {"step": outcome.metrics["step"], "run_id": outcome.run_id, "encoder": outcome.encoder}
    return known | ({} if score is None else {"result": float(score)})


def run_trials(plan: Plan, folder: Path, parent: str, screen: Screen) -> None:
    """Let Ray Tune run all trials that have not ended, until each has ended or failed.

    Raises:
        KmtrError: none can be trained.
    """
    config = plan.space.config
    if config.search.scheduler == "asha":
        scheduler: Any = Halving(config, plan.trials)
        stopped = scheduler.stopped
    else:
        scheduler, stopped = FIFOScheduler(), set()
    asking = Asking(plan.next_trial, plan, parent)
    left = sum(not trial.ended for trial in plan.trials) + plan.wanted - len(plan.trials)
    _run(plan, asking, left, scheduler, Desk(plan, stopped, screen), folder)
    if why := plan.hopeless:
        raise KmtrError(f"search {plan.ledger.name}: {why}")
    if (run := plan.next_trial(asking.begun)) is not None:
        raise KmtrError(f"search {plan.ledger.name}: Ray Tune ended before {run.name} began; the same command goes on")


def run_population(plan: Plan, folder: Path, parent: str, screen: Screen) -> None:
    """Let Ray Tune run the members of population based training from look to look.

    Raises:
        KmtrError: none can be trained.
    """
    while (segment := pbt.next_segment(plan)) is not None:
        until, runs = segment
        asking = Asking(partial(_not_begun, runs), plan, parent, until)
        _run(plan, asking, len(runs), FIFOScheduler(), Desk(plan, set(), screen), folder)
        now = plan.ledger.runs
        pbt.tidy(plan)
        if why := plan.hopeless:
            raise KmtrError(f"search {plan.ledger.name}: {why}")
        if all(now[run.name].step == run.step and now[run.name].status == run.status for run in runs):
            raise KmtrError(f"search {plan.ledger.name}: no member came further than step {runs[0].step}")


def _not_begun(runs: Sequence[Trial], begun: set[str]) -> Trial | None:
    return next((run for run in runs if run.name not in begun), None)


def run_repeats(plan: Plan, folder: Path, parent: str, screen: Screen) -> None:
    """Let Ray Tune run the recipe and the best trials with fresh seeds, whole."""
    runs = [run for run in plan.repeats() if not run.ended]
    asking = Asking(partial(_not_begun, runs), plan, parent)
    _run(plan, asking, len(runs), FIFOScheduler(), Desk(plan, set(), screen), folder)


def _run(plan: Plan, asking: Asking, count: int, scheduler: Any, desk: Desk, folder: Path) -> None:
    if not count:
        return
    tuner = tune.Tuner(
        tune.with_resources(train_trial, {"memory": 1}),  # a byte, since nothing is refused: it waits, the CPUs do not
        tune_config=tune.TuneConfig(
            search_alg=asking,
            scheduler=scheduler,
            num_samples=count,
            max_concurrent_trials=plan.search.concurrent,
            reuse_actors=False,
            trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            callbacks=[desk],
            failure_config=tune.FailureConfig(max_failures=LOST),
        ),
    )
    tuner.fit()


def job_of(config: RunConfig, run: Trial, parent: str, until: int = 0) -> dict[str, Any]:
    """Task of a run's process. The run is named after the search, whose name also fixes how it is scored.

    Args:
        until: step at which it pauses; 0: it goes to its end.
    """
    kind = "trial" if not run.repeats else "recipe" if not run.values else "confirm"
    tags = {f"search.{key}": typed(value) for key, value in run.values.items()}
    tags |= tracking.started_by() | {"search.trial": str(run.number), "search.kind": kind, "search.stopped": "no"}
    if run.donor:
        tags |= {"search.generation": str(run.generation), "search.donor": run.donor}
    return {
        "name": run.name,
        "title": title_of(run),
        "config": to_json(override(settings(config, run), {"train.until": until})),
        "parent": parent,
        "tags": tags,
    }


def title_of(run: Trial) -> str:
    """Name of a run in MLflow: what differs."""
    look = f" after look {run.generation}" if run.generation else ""
    of = "recipe" if not run.values else f"{run.number:02d}{look} {shown(run.values)}"
    return of if run.seed is None else f"{of}  seed={run.seed}"
