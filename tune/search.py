"""python tune/search.py RECIPE [key=value ...]

Searches settings of pretraining, or of training on labels with stage=task. Every trial is a run of
its own (a child run in MLflow), scored on the same held-out subjects with the same patterns.

search.space.KEY=DOMAIN names what is searched; without any, temperature, mask ratio and
acceleration are. ASHA stops trials that fall behind: a trial reports at every checkpoint, so
train.eval_every decides for both. Then the best trials and the recipe itself run again with fresh
seeds, whole (search.confirm, search.noise_seeds), and the verdict says whether a trial is better
than the recipe beyond noise.

The same command resumes: what ended is kept; more search.trials go on from the same ones.
run.fresh=true starts anew. search.dry_run=true only says what would run.

examples:
  python tune/search.py tiny search.trials=16
  python tune/search.py tiny search.space.align.temperature='loguniform(0.02,0.5)'
  python tune/search.py tiny stage=task task.tasks=diseases search.space.augment.shift='grid(0,0.1)'
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import main, recipe_config  # first: goes on with the project's Python if need be
from kmtr.config import RunConfig, override, to_json
from kmtr.files import write_atomic
from kmtr.owner import owning
from kmtr.ray_start import start_ray
from kmtr.train.room import lacking, reserved, uses_gpus
from kmtr.types import InputError, KmtrError, StoppedError, redact

if TYPE_CHECKING:
    from kmtr.data.dataset.reader import Dataset
    from tune.ledger import Trial
    from tune.plan import Plan
    from tune.space import Space

IDENTITY = "what.json"
"""File in a search's folder: what it searches, on which data, and how it scores."""
MIN_HELD_OUT = 3
"""Held-out subjects below which nothing is scored."""


def run(words: list[str]) -> dict[str, Any]:
    """Search, or find that it is done; what the last line on stdout says.

    Raises:
        InputError: this search can't run, on this dataset or cluster.
        KmtrError: no trial finished with a score, or another command is at work on the search.
    """
    from kmtr.train import driver, registered
    from kmtr.train.folder import content_digest
    from tune import report, space
    from tune.ledger import Ledger
    from tune.plan import Plan

    os.environ.pop("MLFLOW_RUN_ID", None)
    config = recipe_config(words, __doc__ or "")
    config = override(config, {"train.checkpoint_every": config.train.eval_every})
    space.of(config)  # before a dataset is looked for
    if config.run.begin:
        raise InputError("run.begin: expected none in a search, whose trials begin anew, got one")
    config, dataset = driver.resolve(config)
    check_scores(config, dataset)
    searched = space.of(config)
    check_searched(searched)
    registered.check(config)
    what = identity(config, content_digest(config, dataset))
    named = config.run.name or f"search-{config.recipe}-{hashed(what)}"
    name, folder = driver.run_folder(override(config, {"run.name": named}), dataset)
    check_same(folder, name, what)
    earlier = earlier_trials(config, what)

    def planned() -> Plan:
        plan = Plan(searched, Ledger(folder, name), earlier)
        plan.again()
        plan.drawn()
        return plan

    plan = planned()
    announce(plan, name)
    if config.search.dry_run:
        return {"search": name, "trials": plan.wanted, "values": [dict(trial.values) for trial in plan.trials]}
    if plan.done and report.published(plan, folder):
        from kmtr import tracking

        print(f"search: {name} is finished, reused (run.fresh=true starts anew)")
        report.send_rest(config, plan.ledger)
        return told(plan, name, tracking.find_run(config.tracking.uri, config.tracking.experiment, name) or "")
    folder.mkdir(parents=True, exist_ok=True)
    with owning(folder, f"search {name}"):
        plan = planned()  # as whoever was waited for left it
        write_atomic(folder / "config.json", redact(to_json(config)))
        write_atomic(folder / IDENTITY, json.dumps(what))
        start_ray()
        check_room(config)
        return searched_through(plan, name, folder, dataset)


def searched_through(plan: Plan, name: str, folder: Path, dataset: Dataset) -> dict[str, Any]:
    """Run all that is left of a plan, and say what came of it."""
    from tune import report, scheduler

    config = plan.space.config
    parent = report.open_parent(config, name, plan.wanted, dataset.digest)
    began = time.perf_counter()
    with closing(plan, parent):
        run_all = scheduler.run_population if plan.search.scheduler == "pbt" else scheduler.run_trials
        with shown_on_screen(plan, plan.trials, plan.wanted) as screen:
            run_all(plan, folder, parent, screen)
        again = plan.repeats()
        if left := [run for run in again if not run.ended]:
            print(f"search: {len(left)} runs with fresh seeds, of the recipe and of the best trials", flush=True)
            with shown_on_screen(plan, again, len(again)) as screen:
                scheduler.run_repeats(plan, folder, parent, screen)
    print(f"search: {name} ended after {time.perf_counter() - began:.0f} s")
    page = report.publish(plan, folder, parent)
    print(f"  report    {page}")
    return told(plan, name, parent)


@contextmanager
def shown_on_screen(plan: Plan, runs: list[Trial], wanted: int) -> Iterator[Any]:
    from tune.screen import Screen

    screen = Screen(runs, wanted, plan.space.config.total_steps, plan.search.concurrent)
    try:
        yield screen
    finally:
        screen.close()


def announce(plan: Plan, name: str) -> None:
    """Print what is about to run: the search, what it reserves, how long it takes, and a line for each trial."""
    from tune import scheduler
    from tune.expected import expected
    from tune.plan import rungs
    from tune.space import shown

    config, search = plan.space.config, plan.search
    count, steps = plan.wanted, config.total_steps
    print(
        f"search: {name}: {count} trials of {steps} steps, {search.concurrent} at a time; score "
        f"{scheduler.score_of(config)} on the same held-out subjects every {config.train.eval_every} steps"
    )
    if search.scheduler == "asha":
        looks = rungs(config)
        print(
            f"  ASHA      one bracket, eta {search.eta}, grace {min(search.grace_steps, steps)} steps; looks at "
            f"{', '.join(map(str, looks)) or 'no step, since a trial is no longer than its grace'}"
        )
        if config.masked_steps and config.align_steps and search.grace_steps < config.masked_steps:
            print("            and so also before alignment, in which alone the temperature acts")
    if search.scheduler == "pbt":
        print(
            f"  PBT       looks every {search.grace_steps} steps: the last of four goes on from the state of the first "
            "with its values changed; nothing runs again with fresh seeds"
        )
    elif search.confirm.best:
        print(
            f"  confirm   the best {search.confirm.best} with {search.confirm.seeds} fresh seeds each, the recipe with "
            f"{search.noise_seeds}"
        )
    wanted = reserved(config, search.concurrent * config.train.workers.least, gpus=config.train.device == "cuda")
    resources = ", ".join(f"{amount:g} {kind}s" for kind, amount in wanted.items() if amount)
    gpus = ", and a GPU for each worker where the cluster has some" if config.train.device == "auto" else ""
    print(f"  reserves  {resources} for {search.concurrent} trial(s) of {config.train.workers} worker(s){gpus}")
    print(f"  time      {expected(plan)}")
    for trial in plan.trials:
        state = f"  {trial.status} {trial.score:.4f}" if trial.ended else ""
        print(f"  trial {trial.number:>3}  {shown(trial.values)}{state}")
    if len(plan.trials) < count:
        print(f"  trials {len(plan.trials)} to {count - 1} follow from the scores of those before (TPE)")
    sys.stdout.flush()


@contextmanager
def closing(plan: Plan, parent: str) -> Iterator[None]:
    """End the MLflow runs of trials that Tune stopped after the block that runs them, and then the parent's."""
    from kmtr import tracking
    from tune.report import close_children, send_rest

    config = plan.space.config
    status: Literal["FINISHED", "FAILED", "KILLED"] = "KILLED"
    try:
        yield
        close_children(config, plan.ledger)
        send_rest(config, plan.ledger)
        status = "FINISHED" if plan.ranked() else "FAILED"
    except (KeyboardInterrupt, StoppedError):
        close_children(config, plan.ledger)
        raise
    except BaseException:
        status = "FAILED"
        raise
    finally:
        tracking.end_run(config.tracking.uri, parent, status)


def told(plan: Plan, name: str, parent: str) -> dict[str, Any]:
    """Print the tables and the verdict; what the last line says.

    Raises:
        KmtrError: no trial finished with a score.
    """
    from kmtr.report.html import text_table
    from kmtr.train import registered
    from tune import report

    config = plan.space.config
    best, verdict, said = report.conclusion(plan)
    print(text_table(report.table(plan)))
    if verdict is not None:
        print(text_table(report.confirmations(plan, verdict)))
    if best is None:
        reasons = [f"trial {t.number}: {t.reason}" for t in plan.trials if t.status == "failed"]
        raise KmtrError(f"search {name}: {said}; {(reasons or ['no score on this dataset'])[0]}")
    print(f"  verdict   {said}\n  encoder   {best.encoder}")
    confirmed = verdict is not None and verdict.best is not None
    asked = registered.asked(config)
    return {
        "run_id": parent,
        "verdict": said,
        "confirmed": confirmed,
        "best": dict(best.values),
        "best_trial": best.number,
        "best_run_id": best.run_id,
        "encoder": best.encoder,
        **({"registered": f"models:/{asked}@best"} if asked else {}),
        "metrics": {"score": best.score}
        | ({} if verdict is None else {"noise_sd": verdict.noise_sd, "gain": verdict.comparisons[0].gain}),
        "trials": plan.wanted,
        "steps_fraction": round(report.steps_fraction(plan), 4),
    }


def check_searched(searched: Space) -> None:
    """Refuse values that a run would refuse only when it begins.

    Raises:
        InputError: one line that names the key.
    """
    from kmtr.train import start
    from tune import pbt
    from tune.space import Choice

    config = searched.config
    if config.search.earlier and config.search.sampler != "tpe":
        raise InputError(
            "search.earlier: expected search.sampler=tpe, which alone learns from earlier trials, got random"
        )
    if config.search.scheduler == "pbt":
        pbt.check(searched)
    if config.stage == "task" and config.task.encoder != start.NONE:
        for key, domain in searched.domains.items():
            for value in domain.values if isinstance(domain, Choice) else (domain.low, domain.high):
                start.check_fits(override(config, {key: value}), Path(config.task.encoder))


def check_same(folder: Path, name: str, what: dict[str, Any]) -> None:
    """Refuse the folder of another search, as one that `run.name` names may be.

    Raises:
        InputError: says what differs.
    """
    from kmtr.train.folder import IDENTITY as RUN_IDENTITY

    path = folder / IDENTITY
    if not path.is_file() and (folder / RUN_IDENTITY).is_file():
        raise InputError(f"run.name: expected the name of a search or a new one, got {name}, which is a run")
    known = json.loads(path.read_text()) if path.is_file() else what
    for part in what:
        if known.get(part) != what[part]:
            raise InputError(
                f"run.name: search {name} had another {part}, {known.get(part)}, got {what[part]}; take another "
                "run.name, or run.fresh=true"
            )


def earlier_trials(config: RunConfig, what: dict[str, Any]) -> list[Trial]:
    """Trials of `search.earlier`, whose scores TPE learns from.

    Raises:
        InputError: there is no such search in storage.root, or its scores do not compare.
    """
    from tune.ledger import STATE, Ledger

    found: list[Trial] = []
    for name in config.search.earlier:
        folder = Path(config.storage.root) / name
        if not (folder / STATE).is_file() or not (folder / IDENTITY).is_file():
            raise InputError(f"search.earlier: expected the name of a search in {config.storage.root}, got {name!r}")
        other = json.loads((folder / IDENTITY).read_text())
        if other["score"] != what["score"] or other["data"] != what["data"]:
            raise InputError(
                f"search.earlier: expected a search on the same data with the same score, got {name}, which has "
                f"{other['score']} on {other['data'][:12]}"
            )
        found += [trial for trial in Ledger(folder, name).trials if trial.ended]
    return found


def check_scores(config: RunConfig, dataset: Dataset) -> None:
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
    if config.stage != "task" and not any(dataset.labels.get(name) for name in PROBED):
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


def identity(config: RunConfig, digest: str) -> dict[str, Any]:
    """All that decides trials and scores; not how many trials there are, who draws them and what runs again, so that a
    search can be extended. A population's size counts: its members are compared with each other.

    Args:
        digest: of all content that a run depends on.
    """
    search, train = config.search, config.train
    stops = [search.scheduler, search.grace_steps, search.eta] if search.scheduler != "none" else []
    score = [config.stage, list(config.task.tasks), list(config.evaluate.accelerations)]
    return {
        "data": digest,
        "run": config.identity(),
        "space": search.space,
        "stops": [*stops, search.trials] if search.scheduler == "pbt" else stops,
        "score": [*score, train.eval_every, train.eval_subjects, train.eval_seed],
    }


def hashed(what: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


if __name__ == "__main__":
    main(__doc__ or "", run)
