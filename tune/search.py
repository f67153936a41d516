"""python tune/search.py RECIPE [key=value ...]

Searches temperature, mask ratio and acceleration. Every trial is a pretraining run of its own (a
child run in MLflow), scored by the ridge probe on held-out subjects.

Trials report at each checkpoint, so a search checkpoints exactly when it validates:
train.eval_every decides for both, and with it how often ASHA looks. From search.grace_steps on,
ASHA stops a trial whose score is below the median of those that came as far, and looks again at 2,
4, ... times as many steps. All trials are validated at evaluate.accelerations, whatever R they
train at. The temperature acts in alignment only: with search.grace_steps below masked.steps,
trials are also stopped before they reach it.

The same command resumes: finished and stopped trials are kept; more search.trials go on from the
same ones. run.fresh=true starts anew.

examples:
  python tune/search.py tiny search.trials=16
  python tune/search.py tiny search.temperature=0.05,0.2 search.accelerations=4,8
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import main, recipe_config  # first: goes on with the project's Python if need be
from kmtr.config import RunConfig, override, to_json
from kmtr.files import write_atomic
from kmtr.owner import owning
from kmtr.ray_start import start_ray
from kmtr.train.room import lacking, reserved, uses_gpus
from kmtr.types import InputError, KmtrError, redact

if TYPE_CHECKING:
    from kmtr.data.dataset.reader import Dataset
    from tune.ledger import Ledger, Trial

MIN_HELD_OUT = 3
"""Held-out subjects below which the probe gives no score."""


def run(words: list[str]) -> dict[str, Any]:
    """Search, or find that it is done; what the last line on stdout says.

    Raises:
        InputError: this search can't run, on this dataset or cluster.
        KmtrError: no trial finished with a score, or another command is at work on the search.
    """
    from kmtr import tracking
    from kmtr.report.html import text_table
    from kmtr.train import driver
    from tune import report, scheduler, space
    from tune.ledger import Ledger

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
    if ledger.done:
        print(f"search: {name} is finished, reused (run.fresh=true starts anew)")
        parent = tracking.find_run(config.tracking.uri, config.tracking.experiment, name) or ""
        print(text_table(report.table(ledger)))
        return outcome_of(parent, ledger, best_of(ledger, name))
    folder.mkdir(parents=True, exist_ok=True)
    with owning(folder, f"search {name}"):
        ledger = Ledger(folder, name, drawn)  # as whoever was waited for left it
        write_atomic(folder / "config.json", redact(to_json(config)))
        start_ray()
        check_room(config)
        announce(config, ledger, name)
        parent = report.open_parent(config, name, len(drawn), dataset.digest)
        began = time.perf_counter()
        with closing(config, ledger, parent):
            scheduler.run_trials(config, ledger, folder, parent)
    best = best_of(ledger, name)
    print(f"search: {name} ended after {time.perf_counter() - began:.0f} s")
    page = report.publish(config, ledger, folder, parent, best)
    print(text_table(report.table(ledger)))
    print(f"  best      trial {best.number}: {report.shown(best.values)}")
    print(f"  encoder   {best.encoder}\n  report    {page}")
    return outcome_of(parent, ledger, best)


def announce(config: RunConfig, ledger: Ledger, name: str) -> None:
    """Print what is about to run, a line for each trial."""
    from tune.report import shown

    print(
        f"search: {name}: {len(ledger.trials)} trials of {config.total_steps} steps, {config.train.workers} worker(s) "
        f"each, {config.search.concurrent} at a time; score: held-out probe R² every {config.train.eval_every} steps",
        flush=True,
    )
    for trial in ledger.trials:
        state = f"  {trial.status}" if trial.ended else ""
        print(f"  trial {trial.number:>3}  {shown(trial.values)}{state}", flush=True)


@contextmanager
def closing(config: RunConfig, ledger: Ledger, parent: str) -> Iterator[None]:
    """End the MLflow runs of trials that Tune stopped after the block that runs them, and then the parent's."""
    from kmtr import tracking
    from tune.report import close_children

    status: Literal["FINISHED", "FAILED", "KILLED"] = "KILLED"
    try:
        yield
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


def best_of(ledger: Ledger, name: str) -> Trial:
    """The best trial of a search that ran.

    Raises:
        KmtrError: none finished with a score.
    """
    best = ledger.best()
    if best is None:
        reasons = [f"trial {t.number}: {t.reason}" for t in ledger.trials if t.status == "failed"]
        raise KmtrError(
            f"search {name}: no trial finished with a score; {(reasons or ['no probe on this dataset'])[0]}"
        )
    return best


def check_probe(dataset: Dataset) -> None:
    """Refuse a dataset on which trials can't be scored.

    Raises:
        InputError: too few held-out subjects, or none with a label that the probe predicts.
    """
    from kmtr.types import PROBED

    if dataset.rows("val") < MIN_HELD_OUT:
        raise InputError(
            f"data.root: a search scores held-out subjects, expected at least {MIN_HELD_OUT} in the split val, got "
            f"{dataset.rows('val')}; write the dataset with shards.split=hash"
        )
    if not any(dataset.labels.get(name) for name in PROBED):
        raise InputError(f"data.root: a search scores {', '.join(PROBED)}, expected one of them as a label, got none")


def check_room(config: RunConfig) -> None:
    """Refuse a cluster where not all concurrent trials fit at once: one that holds workers while its readers wait would
    block the others.

    Raises:
        InputError: the cluster has too few CPUs or GPUs.
    """
    import ray

    train, count, have = config.train, config.search.concurrent, ray.cluster_resources()
    wanted = reserved(config, count * train.workers.least, gpus=uses_gpus(train.device))
    for kind in lacking(wanted, have):
        raise InputError(
            f"search.concurrent: {count} trial(s) of {train.workers} worker(s) with their readers need "
            f"{wanted[kind]:g} {kind}s, the cluster has {have.get(kind, 0):g}; lower search.concurrent or train.workers"
        )


def search_name(config: RunConfig, digest: str) -> str:
    """Recipe and hash of all that decides trials and scores; not how many trials, so that a search can be extended."""
    what = {
        "run": override(config, {"run.name": ""}).run_name(digest),
        "space": config.search.model_dump(mode="json", exclude={"trials", "concurrent"}),
        "score": [config.train.eval_every, config.train.eval_subjects, list(config.evaluate.accelerations)],
    }
    return f"search-{config.recipe}-{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]}"


def outcome_of(parent: str, ledger: Ledger, best: Trial) -> dict[str, Any]:
    return {
        "run_id": parent,
        "best": best.values,
        "best_run_id": best.run_id,
        "encoder": best.encoder,
        "metrics": {"probe_r2": best.score},
        "trials": len(ledger.trials),
    }


if __name__ == "__main__":
    main(__doc__ or "", run)
