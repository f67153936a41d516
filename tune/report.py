"""Result of a search: verdict, tables and figures, a page of its own, and the parent run in MLflow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kmtr import tracking
from kmtr.config import RunConfig, typed
from kmtr.files import write_atomic
from kmtr.metrics.resampling import Difference, difference, resample
from kmtr.report.html import Table, markdown_table, png, write_report
from kmtr.tracking.store import reaching
from kmtr.train import driver, held, registered
from kmtr.train import folder as runs
from kmtr.types import KmtrError, redact
from tune import figures
from tune.importance import ENOUGH, importance
from tune.ledger import FAILED, FINISHED, RECIPE, STOPPED, WAITING, Ledger, Trial
from tune.plan import Plan
from tune.space import shown
from tune.verdict import Verdict, sentence

RESAMPLES = 1000
PUBLISHED = "published"
"""File in a search's folder, written last: digest of the ledger that MLflow and the page show, and under which name its
best trial was registered."""


def open_parent(config: RunConfig, name: str, trials: int, digest: str) -> str:
    """The MLflow run that all runs of the search are children of, opened again where the search has one; its id.

    Args:
        digest: of the dataset.
    """
    uri = config.tracking.uri
    parent = tracking.open_run(
        config,
        name=name,
        resume_id=tracking.find_run(uri, config.tracking.experiment, name),
        tags={"search.trials": str(trials), "search.kind": "search"},
        besides=("search",),
    )
    tracking.log_dataset(uri, parent, Path(config.data.root).name, digest, config.data.root)
    return parent


def close_children(config: RunConfig, ledger: Ledger) -> None:
    """End the MLflow runs whose process Tune killed, after what their spools still hold is sent."""
    uri = config.tracking.uri
    for run in list(ledger.runs.values()):
        if run.status == FINISHED or (run.status == STOPPED and run.run_id):
            continue
        run_id = tracking.find_run(uri, config.tracking.experiment, run.name)
        if run_id is None:
            continue
        ledger.update(run.name, run_id=run_id)
        tracking.send_rest(Path(config.storage.root) / run.name, uri, driver.NODES_S)
        tracking.replay(Path(config.storage.root) / run.name / "spool", uri)
        stopped = "replaced" if config.search.scheduler == "pbt" else "asha"
        why = {STOPPED: stopped, WAITING: "interrupted"}.get(run.status)
        if why is not None:
            with reaching(uri) as mlflow:
                mlflow.set_tag(run_id, "search.stopped", why)
        tracking.end_run(uri, run_id, "FAILED" if run.status == FAILED else "KILLED")


def send_rest(config: RunConfig, ledger: Ledger) -> None:
    """Send what finished runs could not send; up to the first of which something is left, since MLflow is away then."""
    for run in ledger.runs.values():
        done = runs.finished(Path(config.storage.root) / run.name) if run.status == FINISHED else None
        if done is not None and tracking.unsent(Path(driver.settled(done, config).folder) / driver.SPOOL):
            return


def steps_fraction(plan: Plan) -> float:
    """Steps that the trials took over those of as many whole runs."""
    return sum(trial.step - trial.begun for trial in plan.trials) / (plan.wanted * plan.space.config.total_steps)


def conclusion(plan: Plan) -> tuple[Trial | None, Verdict | None, str]:
    """The trial that is left, the verdict and its sentence: a trial that is confirmed to be better than the recipe,
    else the one with the best score.
    """
    verdict, ranked = plan.verdict(), plan.ranked()
    best = verdict.best if verdict else None
    if best is not None:
        chosen = next((trial for trial in plan.ledger.ranked() if trial.number == best.number), None)
    else:
        chosen = ranked[0] if ranked else None
    words = f"trial {chosen.number} ({shown(chosen.values)})" if chosen else ""
    return chosen, verdict, sentence(verdict, words)


def publish(plan: Plan, folder: Path, parent: str) -> Path:
    """The result in MLflow's parent run, and as a page of its own beside the ledger."""
    config = plan.space.config
    best, verdict, said = conclusion(plan)
    tables = [table(plan)]
    if verdict is not None:
        tables.append(confirmations(plan, verdict))
    weights = importance(plan.space, plan.trials)
    if weights:
        tables.append(Table("Importance of each key (PED-ANOVA)", ("key", "share"), tuple(weights.items())))
    title = f"Search {folder.name}"
    summary = "\n\n".join([f"{said[0].upper()}{said[1:]}.", *about(plan, verdict, bool(weights))])
    pictures = figures.all_of(plan, best)
    page = write_report(
        folder / "search.html",
        title=title,
        summary=summary,
        tables=tables,
        figures=[(caption, figure) for _, caption, figure in pictures],
        footer=f"MLflow run {parent}; data {redact(config.data.root)}",
    )
    files = [page, figures.interactive(plan, folder / "interactive.html")]
    for name, _, figure in pictures:
        (folder / f"{name}.png").write_bytes(png(figure))
        files.append(folder / f"{name}.png")
    note = "\n\n".join([f"**{said}**", *about(plan, verdict, bool(weights)), *map(markdown_table, tables)])
    with reaching(config.tracking.uri) as mlflow:
        for trial in plan.trials:
            if math.isfinite(trial.score):
                mlflow.log_metric(parent, "trial/score", trial.score, step=trial.number)
        tags: dict[str, Any] = {"search.verdict": said, "mlflow.note.content": f"# {title}\n\n{note}"[:8000]}
        if best is not None:
            mlflow.log_metric(parent, "best/score", best.score)
            tags |= {"best/trial": best.number, "best/run_id": best.run_id, "best/run_name": best.name}
            tags |= {f"best/{key}": typed(value) for key, value in best.values.items()}
        if verdict is not None:
            mlflow.log_metric(parent, "search/noise_sd", verdict.noise_sd)
            mlflow.log_metric(parent, "search/gain", verdict.comparisons[0].gain)
        for key, value in tags.items():
            mlflow.set_tag(parent, key, str(value))
        for file in files:
            mlflow.log_artifact(parent, str(file))
    if best is not None:
        register(plan, best, said, verdict)
    write_atomic(folder / PUBLISHED, _mark(plan))
    return page


def register(plan: Plan, best: Trial, said: str, verdict: Verdict | None) -> None:
    """The trial that is left in MLflow's registry (`registered.asked`) as ``@best``; as ``@confirmed`` only where
    it is better than the recipe beyond noise. What another search has confirmed stays so.
    """
    config = plan.space.config
    found = registered.register(config, best.run_id, best.encoder)
    if found:
        version = found["registered"].rpartition("/")[2]
        sure = verdict is not None and verdict.best is not None
        ours = {run.run_id for run in plan.ledger.runs.values()} - {""}
        aliases = {"best": True, "confirmed": sure}
        tracking.point(config.tracking.uri, registered.asked(config), version, aliases, said, ours)


def published(plan: Plan, folder: Path) -> bool:
    """True if what the ledger says now was published."""
    path = folder / PUBLISHED
    return path.is_file() and path.read_text() == _mark(plan)


def _mark(plan: Plan) -> str:
    return f"{plan.ledger.digest} {registered.asked(plan.space.config)}".rstrip()


def about(plan: Plan, verdict: Verdict | None, important: bool) -> list[str]:
    """What a reader has to know of a search, a sentence each."""
    config, search = plan.space.config, plan.search
    said = [
        f"Every trial has {config.total_steps} steps at most, the same data, and validation subjects and patterns that "
        f"are the same for all (R = {', '.join(map(str, config.evaluate.accelerations))}); the score is "
        + ("the mean over tasks." if config.stage == "task" else "the mean R² of ridge probes on held-out subjects.")
    ]
    if search.scheduler == "pbt":
        said.append(
            "Population based training: at every look members that fell behind went on from the state of one that led, "
            f"with its values changed ({sum(bool(t.donor) for t in plan.trials)} times). What is left is a schedule "
            "of values, which was not run again with fresh seeds."
        )
    if search.scheduler == "asha":
        said.append(
            f"ASHA stopped {sum(t.status == STOPPED for t in plan.trials)} of {plan.wanted} trials; all took "
            f"{steps_fraction(plan):.0%} of the steps of whole ones."
        )
    if verdict is not None:
        seeds = len(plan.ledger.repeats(RECIPE))
        said.append(
            f"The recipe has {verdict.recipe:.4f} with {seeds} fresh seeds. The best trials were run again, whole, "
            "with fresh seeds, since the best of many scores is high by luck: only these fresh scores are compared."
        )
    if not important:
        finished = sum(trial.scored for trial in plan.trials)
        said.append(f"Importance of keys: too few finished trials to say, {finished} of {ENOUGH}.")
    return said


def confirmations(plan: Plan, verdict: Verdict) -> Table:
    """The recipe and the trials that ran again."""
    own = [run.score for run in plan.ledger.repeats(RECIPE) if run.scored]
    rows: list[tuple[Any, ...]] = [("recipe", "", len(own), verdict.recipe, _sd(own), None, "", "")]
    values = {trial.number: trial.values for trial in plan.ledger.trials}
    for one in verdict.comparisons:
        scores = [run.score for run in plan.ledger.repeats(one.number) if run.scored]
        paired = paired_difference(plan, one.number)
        rows.append(
            (
                f"trial {one.number}",
                shown(values.get(one.number, {})),
                one.seeds,
                one.mean,
                _sd(scores),
                one.gain,
                f"{one.low:+.4f} to {one.high:+.4f}",
                "" if paired is None else f"{paired.low:+.4f} to {paired.high:+.4f}",
            )
        )
    return Table(
        caption="Fresh seeds: the best trials against the recipe",
        columns=("setting", "values", "seeds", "mean score", "SD of seeds", "gain", "over seeds", "over subjects"),
        rows=tuple(rows),
        note="Over seeds: the gain is above the lower and below the upper number, each with 95 % over all comparisons "
        f"together; noise SD {verdict.noise_sd:.4f}, {verdict.degrees} degrees of freedom. Over subjects: 95 % "
        "interval of the same gain with these seeds on other subjects (paired bootstrap).",
        digits=4,
    )


def paired_difference(plan: Plan, number: int) -> Difference | None:
    """Gain of a trial over the recipe, each seed's predictions of the same validation subjects resampled together; None
    where they are not all at hand.
    """
    config = plan.space.config
    try:
        sides = [
            [
                held.left(outcome, config)
                for run in plan.ledger.repeats(one)
                if run.scored and (outcome := runs.finished(Path(config.storage.root) / run.name)) is not None
            ]
            for one in (number, RECIPE)
        ]
    except KmtrError:
        return None
    subjects = {said.subjects for side in sides for said in side}
    if not all(sides) or len(subjects) != 1:
        return None
    (count,) = subjects
    own, base = (resample([said.statistic for said in side], count, RESAMPLES) for side in sides)
    return difference(own, base)


def table(plan: Plan) -> Table:
    """All trials, the best score first; what was stopped earlier cannot be above what finished."""
    order = sorted(
        plan.trials, key=lambda t: (t.status != FINISHED, -t.step, -t.score if math.isfinite(t.score) else math.inf)
    )
    keys = list(plan.space.domains)
    return Table(
        caption="Trials by their score on held-out subjects, all with the search's own seed",
        columns=("trial", *keys, "score", "step", "status"),
        rows=tuple(
            (
                _of(t),
                *(typed(t.values.get(key)) for key in keys),
                t.score,
                t.step,
                t.status + (f": {t.reason[:60]}" if t.reason else ""),
            )
            for t in order
        ),
        best=(("score", "max"),) if len(order) > 1 else (),
        digits=4,
    )


def _of(trial: Trial) -> int | str:
    """A trial by its number; of population based training also the look after which it began."""
    return f"{trial.number} after look {trial.generation}" if trial.generation else trial.number


def _sd(scores: Sequence[float]) -> float:
    return statistics.stdev(scores) if len(scores) > 1 else math.nan
