"""Downstream tasks against the number of labels: one model of all tasks, pretrained and from scratch, each task alone,
and floors that need no trained network.

Every seed pretrains its own encoder and draws its own labelled subjects; the held-out subjects and their patterns are
the same for all. A finished row is kept in a folder of its own (`task_rows`), and is never done again, nor is its
pretraining, wherever that folder is taken to.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kmtr import machine, tracking
from kmtr.config import RunConfig, override
from kmtr.data.loader.batch import Batch
from kmtr.evaluate.baselines import lowrank_image
from kmtr.evaluate.predictions import MEAN_MASK, Name, held_out_words
from kmtr.evaluate.predictors import Predictor
from kmtr.evaluate.scores import panel
from kmtr.evaluate.task_predictions import predictions
from kmtr.evaluate.task_tables import MEAN_DICE
from kmtr.inference import TaskModel, load_model
from kmtr.owner import owning
from kmtr.ray_start import start_ray
from kmtr.studies import hands, pictures, task_report
from kmtr.studies.contenders import CONTENDERS, LOWRANK, contender, decided
from kmtr.studies.running import clock, finished, fit, open_run, rate
from kmtr.studies.task_measures import MEAN, MEASURES, headline, kept, mappable, scores_of, targets_of, values_of
from kmtr.studies.task_rows import FLOORS, PRETRAINED, SCRATCH, Asked, Rows, Shown, Values
from kmtr.studies.task_study import (
    TASKS,
    Kind,
    Study,
    bound_settings,
    check_budgets,
    check_settings,
    digest,
    held_out,
    order,
    pretraining,
)
from kmtr.train import start
from kmtr.train.folder import SPEED_CPU, Outcome
from kmtr.train.resolve import resolve
from kmtr.types import InputError

TRIAL, TRIAL_EVERY = 60, 10
"""Steps of a run that measures a speed (no more than k-MTR's own have), and between its measurements."""
KIND = Kind("tasks", order, task_report.report)


def run(config: RunConfig, kind: Kind = KIND) -> dict[str, Any]:
    """Train and score all rows that are not done, or report those that are; what the last line on stdout says."""
    began = time.perf_counter()
    check_settings(config)
    config, dataset = resolve(override(config, {"stage": "both", "task.tasks": config.task.tasks or TASKS}))
    asked = kind.order(config)
    check_budgets(config, dataset, asked)
    truth, places = held_out(config, dataset)
    known = digest(config, dataset, truth)
    name = f"{kind.name}-{config.recipe}-{known}"
    folder = Path(config.storage.root) / "study" / name
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder.with_name(f"rows-{known}")
    where, bound = Path(config.study.rows or kept), bound_settings(config)
    rows = Rows(where, known, config.evaluate.accelerations, places, bound, decided)
    done = rows.read(tell=True)
    print(
        f"study: {name}: {sum(one in done for one in asked)} of {len(asked)} rows are done, "
        f"{held_out_words(config, len(places))}, rows in {rows.folder}",
        flush=True,
    )
    if not config.study.train and not any(one in done for one in asked):
        raise InputError(f"study.train: expected rows to report in {rows.folder}, got none; train them first")
    with owning(kept, f"rows of study {known}"), open_run(config, dataset, name) as run_id:
        study = Study(config, dataset, truth, rows, run_id)
        for seed in config.study.seeds if config.study.train else ():
            if add_missing(study, asked, seed) and seed != config.study.seeds[-1]:
                kind.report(study, name, folder, asked, time.perf_counter() - began)
        return kind.report(study, name, folder, asked, time.perf_counter() - began)


# ------------------------------------------------------------------------------------------------------------ training


def add_missing(study: Study, asked: Sequence[Asked], seed: int) -> int:
    """Train and score the rows of a seed that are not done, with a line for each: how many. Several at a time where a
    run has one worker (`hands`), else one after the other.
    """
    every = with_floors(study.config, asked)
    done = study.rows.read()
    missing = [one for one in every if one not in done and one.seed == seed]
    at_once = 1
    finished_rows: Iterator[hands.Finished] = (make(study, one, study.rows.read()) for one in missing)
    if missing and study.config.train.workers.most == 1:
        start_ray()
        at_once = hands.at_once(study)
        finished_rows = hands.side_by_side(study, missing, make, partial(needs, study))
    for one in finished_rows:
        study.rows.add(one.asked, one.said, one.values, one.shown)
        done = study.rows.read()
        left = [other for other in every if other not in done]
        print(
            f"study: {len(every) - len(left)} of {len(every)} are done: {one.asked.title}; {len(left)} left, about "
            f"{_duration(expected(done, left) / at_once)}",
            flush=True,
        )
    return len(missing)


def with_floors(config: RunConfig, asked: Sequence[Asked]) -> list[Asked]:
    """The rows, and behind k-MTR's of all tasks at each seed and number of labels the floors."""
    found: list[Asked] = []
    for one in asked:
        ours = one.start == PRETRAINED and one.tasks == config.task.tasks
        found += [one, one._replace(start=FLOORS)] if ours else [one]
    return found


def needs(study: Study, asked: Asked) -> hands.Needs:
    """Things that a row shares with others: rows that it takes models from, its pretraining, the speed of k-MTR."""
    row, makes = contender(asked.start), set[str]()
    after = {asked._replace(start=PRETRAINED)} if asked.start == FLOORS else set()
    taken = {asked._replace(start=row.then)} if row.then else set()
    taken |= {first_of(asked)} if row.first in CONTENDERS else set()
    # Rows that came from elsewhere are done, but their models have to be trained anew: by one row, while others wait.
    makes |= {f"model of {one.title}" for one in taken if not there(study, one)}
    if row.pretrained or row.long:
        own = pretraining(study.config, asked._replace(start=PRETRAINED) if row.long else asked)
        makes |= {own.run_name(study.dataset.digest)} if finished(own, study.dataset) is None else set()
    if not (row.then or row.bound or asked.start in (PRETRAINED, SCRATCH, FLOORS)):
        paced = asked._replace(seed=study.config.study.seeds[0], start=row.paced or asked.start)
        for one in (our_own(study, asked), paced):
            if not contender(one.start).pretrained:
                own = speed_run(study, one, start.NONE)
                makes |= {own.run_name(study.dataset.digest)} if finished(own, study.dataset) is None else set()
    return hands.Needs(frozenset(after | taken), frozenset(makes))


def there(study: Study, asked: Asked) -> bool:
    """The model of a row that begins from no other is trained."""
    steps = known_steps(study, asked) or 0
    return finished(study.settings(asked, start.NONE, steps), study.dataset) is not None


def known_steps(study: Study, asked: Asked) -> int | None:
    """Steps of the model of a finished row that are not those of the settings, as the row has them, so that the model
    is the same when it is trained anew on another machine; None: the row is not finished, or the settings say them.
    """
    own = asked.start in (PRETRAINED, SCRATCH) or contender(asked.start).bound
    row = None if own else study.rows.read().get(asked)
    return None if row is None else int(row["steps"])


def expected(done: Mapping[Asked, Mapping[str, Any]], left: Sequence[Asked]) -> float:
    """Seconds that rows will take by those that are done, one after the other: each as the median of its tasks', or of
    all where there is none; and pretraining for each seed that has no pretrained row yet. A row that took less than its
    training found that done.
    """
    alike: dict[tuple[bool, tuple[str, ...]], list[float]] = {}
    for asked, row in done.items():
        took, training = row["row_s"], row.get("training_s") or 0.0
        kind = asked.start == FLOORS, asked.tasks
        alike.setdefault(kind, []).append(took if took > training else took + training)
    every = [seconds for (floors, _), some in alike.items() for seconds in some if not floors]
    before = [row["pretraining_s"] for row in done.values() if row.get("pretraining_s")]
    had, more = ({(one.seed, one.start) for one in some if contender(one.start).pretrained} for some in (done, left))
    rows = sum(statistics.median(alike.get((asked.start == FLOORS, asked.tasks), every)) for asked in left)
    return rows + (statistics.median(before) * len(more - had) if before else 0.0)


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def make(study: Study, asked: Asked, done: hands.Done) -> hands.Finished:
    """A row: its model trained, or found trained, and what it says of the held-out subjects.

    Args:
        done: rows that there are already.
    """
    if asked.start == FLOORS:
        same = [one for one in done if one._replace(seed=asked.seed) == asked and not asked.labels]
        return again(study, asked, same[0], done) if same else floors(study, asked)
    before, row = pretrained(study, asked), contender(asked.start)
    began = time.perf_counter()
    own, outcome, model = model_of(study, asked, before)
    reading = scoring(study, own)
    means = study.means(asked.seed, asked.labels)
    labelled = study.labelled(asked)

    table = predictions(reading, study.dataset, model, labelled, "model", "study", by_areas(study, asked))
    found = values_of(table, study.truth)
    steps = min(own.total_steps, int(outcome.metrics["step"]))
    trained = times(study.config, own, outcome, before) | {"steps": steps, "run": outcome.name}
    trained |= {"parameters": parameters(model.module)} | decided(asked.start)
    if contender(row.then or asked.start).bound:
        trained |= {"converged": steps < own.total_steps, "bound": bound_settings(study.config)}
    if row.first in CONTENDERS:
        first = done[first_of(asked)]
        trained |= {"pretraining_s": first["training_s"], "parameters": trained["parameters"] + first["parameters"]}
    about = scored(study, table, found, means) | trained | made(study, labelled, began)
    (values,) = found.values()
    shown = pictured(study, asked, reading, model, before)
    return hands.Finished(asked, about, {name: values[name] for name in kept(study.config) if name in values}, shown)


def floors(study: Study, asked: Asked) -> hands.Finished:
    """The row of what no trained network is needed for, beside k-MTR's of the same labels."""
    began, ours = time.perf_counter(), asked._replace(start=PRETRAINED)
    own, _, model = model_of(study, ours, pretrained(study, ours))
    reading = scoring(study, own)
    labelled = study.labelled(ours)
    table = predictions(reading, study.dataset, model, labelled, "floors", "study", by_areas(study, asked))
    found = values_of(table, study.truth)
    about = scored(study, table, found, study.means(asked.seed, asked.labels)) | made(study, labelled, began)
    return hands.Finished(asked, about, standing(study.config, found))


def again(study: Study, asked: Asked, other: Asked, done: hands.Done) -> hands.Finished:
    """The row of floors from all labels, which are the same subjects for every seed, as another seed has it. (Of the
    untrained encoder's probe alone that is one seed.)
    """
    about: dict[str, Any] = {k: v for k, v in done[other].items() if k not in {"digest", *Asked._fields}}
    return hands.Finished(asked, about | {"row_s": 0.0, "as_seed": other.seed}, study.rows.values(other))


def scoring(study: Study, own: RunConfig) -> RunConfig:
    """Settings of a run with which its row is scored: held-out subjects, patterns and R are the study's."""
    r = study.config.evaluate.accelerations
    return override(own, {"seed": study.config.seed, "evaluate.accelerations": r})


def by_areas(study: Study, asked: Asked) -> list[str]:
    """Phenotypes that maps make of the areas of a row's masks."""
    there = [name for name in mappable(study.config) if study.dataset.labels.get(name)]
    return there if "segmentation" in asked.tasks else []


def pictured(study: Study, asked: Asked, reading: RunConfig, model: TaskModel, before: Outcome | None) -> Shown:
    """Arrays that a row of the first seed and all labels shows, with k-MTR's embeddings; of other rows none."""
    if asked.seed != study.config.study.seeds[0] or asked.labels:
        return {}
    shown = {**pictures.shown_of(pictures.seen_by(study, reading, model))}
    if before is not None and asked.start == PRETRAINED and asked.tasks == study.config.task.tasks:
        shown |= pictures.embedded(study, before)
    return shown


def pretrained(study: Study, asked: Asked) -> Outcome | None:
    """The pretraining that a row begins from, done where it is not; None: it begins from none."""
    row = contender(asked.start)
    if not row.pretrained:
        return None
    what = "pretraining" if asked.start == PRETRAINED else f"pretraining of {asked.start}"
    return fit(
        pretraining(study.config, asked), study.dataset, study.run_id, f"seed {asked.seed}, {what}", study.in_place
    )


def model_of(study: Study, asked: Asked, before: Outcome | None) -> tuple[RunConfig, Outcome, TaskModel]:
    """Settings, outcome and model of a row, which is trained where it is not.

    Args:
        before: pretraining that it begins from.
    """
    row, device = contender(asked.start), machine.device(study.config.train.device)
    if row.then:
        own, outcome, model = model_of(study, asked._replace(start=row.then), None)
        if row.first == LOWRANK:
            return own, outcome, model.after(image_of(lowrank_image(own.data.matrix)), "low-rank + sparse image")
        _, _, images = model_of(study, first_of(asked), None)
        return own, outcome, model.after(image_of(images), f"image of {contender(row.first).title}")
    encoder = encoder_of(asked, before)
    own = study.settings(asked, encoder, equal_steps(study, asked, encoder))
    outcome = fit(own, study.dataset, study.run_id, asked.title, study.in_place)
    return own, outcome, load_model(outcome.encoder, device)


def encoder_of(asked: Asked, before: Outcome | None) -> str:
    """Folder of the encoder that a row begins from, or `start.NONE`."""
    if before is None:
        return start.NONE
    if contender(asked.start).changes.get("task.system") != "image":
        return before.encoder
    return str(start.image_encoder(before))


def first_of(asked: Asked) -> Asked:
    """The row whose images a row analyses."""
    return Asked(asked.seed, contender(asked.start).first, ("reconstruction",), asked.labels)


def image_of(predictor: Predictor) -> Callable[[Batch], torch.Tensor]:
    """The image that a predictor says."""
    return lambda batch: predictor(batch)["image"]


def equal_steps(study: Study, asked: Asked, encoder: str) -> int:
    """Steps for which a contender trains as many seconds as k-MTR takes for its own (a long one for pretraining too),
    by the speed of a short run of each on this machine (of that whose pace it keeps); 0, the study's own, for k-MTR
    itself and for bounds.
    """
    if asked.start in (PRETRAINED, SCRATCH) or contender(asked.start).bound:
        return 0
    if known := known_steps(study, asked):
        return known

    def trial(one: Asked, begun: str) -> Outcome:
        own = speed_run(study, one, begun)
        return fit(own, study.dataset, study.run_id, f"speed of {one.start}", study.in_place)

    ours, steps = trial(our_own(study, asked), start.NONE), float(study.config.task.steps)
    if contender(asked.start).long:
        before = pretrained(study, asked._replace(start=PRETRAINED))
        assert before is not None
        by = clock(ours, before)
        seconds_before = pretraining_s(study.config, before, by) or 0.0
        speed = rate(ours, TRIAL_EVERY, trial_steps(study.config), by)
        return round(steps + seconds_before * speed / study.config.data.global_batch)
    first = study.config.study.seeds[0]
    paced = trial(asked._replace(seed=first, start=contender(asked.start).paced or asked.start), encoder)
    by = clock(ours, paced)
    theirs, own = (rate(one, TRIAL_EVERY, trial_steps(study.config), by) for one in (paced, ours))
    return max(1, round(steps * theirs / own))


def our_own(study: Study, asked: Asked) -> Asked:
    """The row of k-MTR whose speed that of a contender is compared with."""
    return Asked(study.config.study.seeds[0], SCRATCH, study.config.task.tasks, asked.labels)


def speed_run(study: Study, asked: Asked, encoder: str) -> RunConfig:
    """Settings of the short run that measures a row's speed."""
    steps = trial_steps(study.config)
    return study.settings(asked, encoder, steps, **{"train.log_every": TRIAL_EVERY, "train.eval_every": steps})


def trial_steps(config: RunConfig) -> int:
    """Steps of the short run that measures a row's speed: its first speeds are left out."""
    return min(TRIAL, max(config.task.steps, 2 * TRIAL_EVERY))


def standing(config: RunConfig, found: Mapping[Name, Values]) -> dict[str, np.ndarray]:
    """Values of the floor that stands for each measure (`Measure.floor`), and of its images; also the mean mask's Dice:
    masks that do not beat it have failed.
    """
    values: dict[str, np.ndarray] = {}
    for name, measure in MEASURES.items():
        floor = next((found[one] for one in measure.floor if one in found), {})
        values |= {t: floor[t] for t in (*targets_of(name, config), "psnr_db") if t in floor}
    return values | {f"{MEAN}{t}": v for t, v in found.get(MEAN_MASK, {}).items() if t in MEAN_DICE}


def scored(study: Study, table: pa.Table, found: Mapping[Name, Values], means: Mapping[str, float]) -> dict[str, Any]:
    """Scores of a row for JSON: R -> true R, and of each system its measures and all metrics, with 95 % intervals."""
    config, said = study.config, {}
    each = scores_of(table, config, means, found)
    true = panel(table)
    for number, r in enumerate(config.evaluate.accelerations):
        measures = {name.title: headline(config, values, study.truth, means, number) for name, values in found.items()}
        true_r = round(true.true_acceleration_at(true.accelerations.index(r)), 3)
        said[str(r)] = {"true_R": true_r, "measures": measures, "metrics": each.get(r, {})}
    return {"R": said}


def times(config: RunConfig, own: RunConfig, outcome: Outcome, before: Outcome | None) -> dict[str, Any]:
    """Seconds of the steps of a training and of its pretraining, by the speed that they logged (a run may have been
    killed and resumed), on CPUs of the processor; None: nothing was logged, or there was no pretraining.
    """
    by = clock(outcome)
    trained = seconds(config, outcome, 0, min(own.total_steps, int(outcome.metrics["step"])), by)
    said: dict[str, Any] = {"training_s": trained, "clock": "processor" if by == SPEED_CPU else "wall"}
    if before is not None:
        said["pretraining_s"] = pretraining_s(config, before, clock(before))
        if "align_stopped" in before.metrics:
            said["guard_stopped_at"] = before.metrics["align_stopped"]
    best = {name: outcome.metrics[name] for name in ("best_step", "best_score") if name in outcome.metrics}
    return said | best


def pretraining_s(config: RunConfig, before: Outcome, metric: str) -> float | None:
    """Seconds of the steps of a pretraining; None: nothing was logged."""
    stages = [(0, config.masked_steps), (config.masked_steps, config.total_steps)]
    parts = [seconds(config, before, first, last, metric) for first, last in stages if last > first]
    return sum(part for part in parts if part is not None) if any(parts) else None


def seconds(config: RunConfig, done: Outcome, first: int, last: int, metric: str) -> float | None:
    """Seconds of the steps ]first, last] of a run by its median speed; None: nothing was logged."""
    speed = rate(done, first, last, metric)
    return round((last - first) * config.data.global_batch / speed, 1) if speed > 0 else None


def parameters(module: torch.nn.Module) -> int:
    """Number of weights."""
    return sum(weights.numel() for weights in module.parameters())


def made(study: Study, labelled: Sequence[int], began: float) -> dict[str, Any]:
    """Where, when and of what a row was made."""
    device = machine.device(study.config.train.device)
    return {
        "subjects": len(labelled),
        "row_s": round(time.perf_counter() - began, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "workers": str(study.config.train.workers),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}",
        "versions": tracking.versions(),
        "data": study.dataset.digest[:12],
    }
