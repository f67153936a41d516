"""Report of a model of tasks on held-out subjects: HTML, JSON and CSV, made of the predictions that its run keeps."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from matplotlib.figure import Figure

from kmtr import machine
from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Dataset
from kmtr.evaluate import looks, task_tables, thresholds
from kmtr.evaluate.looks import OTHERS, PREDICTED, Chosen, Look
from kmtr.evaluate.predictions import Name, by_areas, from_masks, held_out_words, read, together
from kmtr.evaluate.scores import MIN_KNOWN, Panel, panel
from kmtr.exported import MODEL_HEAD
from kmtr.files import write_atomic
from kmtr.inference import load_model
from kmtr.metrics import Masks, extreme_frames
from kmtr.metrics.dense import PHASES, Pair
from kmtr.metrics.volumes import volume_curves
from kmtr.report import figures_tasks
from kmtr.report.contact import title_of
from kmtr.report.figures_tasks import Agreed, Tile
from kmtr.report.html import write_report
from kmtr.report.intervals import IntervalTable, text_of
from kmtr.types import DISEASES, PHENOTYPES, VIEWS

FORMAT = 2
"""Number of the report's content; a report of another one is made anew."""
HTML, JSON, TABLES = "report.html", "report.json", "tables"

Picture = tuple[str, Figure]
"""Caption and figure."""


@dataclass(frozen=True)
class Written:
    """Files of a report, and whether they were made now."""

    html: Path
    new: bool


def write(
    config: RunConfig, dataset: Dataset, predictions: Path, model: Path, *, title: str, ours: Name, run: str
) -> Written:
    """Report of the predictions beside them; one that was made of the same before is left as it is. Predictions of
    validation subjects in the same folder (`thresholds.FILE`) choose the thresholds of diseases.

    No file of it names a subject.

    Args:
        model: folder of the model, which is asked again about the few subjects that figures show.
        ours: name of the model in the predictions; all other systems but `CEILINGS` are floors.
        run: id of its MLflow run.
    """
    folder = predictions.parent
    html, data = folder / HTML, folder / JSON
    beside = folder / thresholds.FILE
    validation = beside if beside.is_file() else None
    asked = {"format": FORMAT, "resamples": config.evaluate.bootstrap, "predictions": _digest(predictions)}
    asked |= {"validation": _digest(validation)} if validation else {}
    if html.is_file() and data.is_file() and json.loads(data.read_text()).get("asked") == asked:
        return Written(html, False)
    rows = read(predictions)
    mine, draws = {ours, from_masks(ours), by_areas(ours), together(ours)}, config.evaluate.bootstrap
    tables = task_tables.tables_of(rows, mine, draws, read(validation) if validation else None)
    chosen = looks.choose(rows, ours)
    seen: list[Look] = []
    if chosen is not None:
        loaded = load_model(model, machine.device(config.train.device))
        rs = pc.unique(rows.column("acceleration")).to_pylist()
        seen = looks.looks(config, dataset, loaded, chosen.subjects, rs)
    pictures = subjects(chosen, seen, dataset.slice_order) if chosen else ()
    shown = [*scores(rows, ours, config.evaluate.bootstrap), *pictures]
    about = summary(config, dataset, rows, by_own_masks(model))
    now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    footer = f"run {run}, data {dataset.digest[:12]}, torch {torch.__version__}, {now}"
    data.unlink(missing_ok=True)  # what it speaks of is written anew
    write_tables(folder / TABLES, tables)
    write_report(html, title=title, summary=about, tables=[one.table() for one in tables], figures=shown, footer=footer)
    said: dict[str, Any] = {"title": title, "run_id": run, "data": dataset.digest, "summary": about, "made": now}
    said |= {"tables": [one.json() for one in tables], "figures": [caption for caption, _ in shown], "asked": asked}
    write_atomic(data, json.dumps(said, indent=1, allow_nan=False))
    return Written(html, True)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_tables(folder: Path, tables: Sequence[IntervalTable]) -> None:
    """One CSV file per table, and none that an earlier report left."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.csv"):
        old.unlink()
    for one in tables:
        write_atomic(folder / f"{one.name}.csv", one.csv())


def by_own_masks(model: Path) -> tuple[str, ...]:
    """Labels that the model in a folder answers by areas of its masks."""
    return tuple((json.loads((model / MODEL_HEAD).read_text()).get("areas") or {}).get("answers", ()))


def summary(config: RunConfig, dataset: Dataset, rows: pa.Table, answers: Sequence[str] = ()) -> str:
    """Data, method and conventions in words.

    Args:
        answers: labels that the model answers by areas of its masks.
    """
    held_out = pc.count_distinct(rows.column("subject")).as_py()
    (labels,) = pc.unique(rows.column("labels")).to_pylist()
    begun = "initial weights" if config.task.encoder == "none" else "a pretrained encoder"
    mapped = (
        f"\n\nAreas of masks: phenotypes by a linear map from the areas of all classes and slices over the cycle, "
        f"fitted at each R on the masks that a system predicts of at most {config.evaluate.mapped} of the training "
        "subjects, and diseases by a logistic regression, fitted on true phenotypes, on what it says. Areas and head: "
        "a regression of phenotypes from both, fitted on validation subjects. With areas the model answers what those "
        f"subjects say that it knows better so than by its heads alone: {', '.join(answers) or 'nothing'}."
    )
    mapped = mapped if "segmentation" in config.task.tasks else ""
    return (
        f"Tasks: {', '.join(config.task.tasks)}. Data: {dataset.source}. Trained on {labels} subjects from {begun}, "
        f"scored on {held_out_words(config, held_out)} at each R; patterns of family {config.sampling.family}. R is "
        f"nominal, true R counts the lines that were really acquired.\n\nFloors need no network: the mean of the "
        f"training labels, a ridge regression on the low-resolution zero-filled image, a logistic regression from "
        f"phenotypes that this one predicts to each disease, the mean mask, a linear map from the temporally shared "
        f"image to the mask, the zero-filled, the temporally shared and the low-rank + sparse image.{mapped}"
    )


# ------------------------------------------------------------------------------------------------ scores


def scores(rows: pa.Table, ours: Name, resamples: int) -> list[Picture]:
    """Agreement of phenotypes at each R, also of those measured on masks or made of their areas; ROC of diseases."""
    there = set(pc.unique(rows.column("target")).to_pylist())
    found: list[Picture] = []
    if targets := tuple(name for name in PHENOTYPES if name in there):
        seen = panel(rows, targets=targets)
        for system in (ours, from_masks(ours), by_areas(ours), together(ours)):
            found += agreements(seen, system)
    if targets := tuple(name for name in DISEASES if name in there):
        found += roc_curves(panel(rows, targets=targets), ours, resamples)
    return found


def agreements(seen: Panel, system: Name) -> list[Picture]:
    """A figure for each R; none where the system says nothing."""
    found: list[Picture] = []
    for fit, values in seen.values.items():
        for number, r in enumerate(seen.accelerations) if fit.name == system else ():
            shown = [
                Agreed(title_of(target).removesuffix(f" ({PHENOTYPES[target]})"), PHENOTYPES[target], truth, said)
                for target, truth, said in zip(seen.targets, seen.truth.T, values[number].T, strict=True)
                if (np.isfinite(truth) & np.isfinite(said)).sum() >= MIN_KNOWN
            ]
            if shown:
                title = f"{system.title}, R = {r} (true {seen.true_acceleration_at(number):.2f})"
                caption = (
                    f"{title}: predicted against true with the line of identity, and Bland-Altman: bias (solid) and "
                    f"95 % limits of agreement (dashed)."
                )
                found.append((caption, figures_tasks.agreements(shown, title)))
    return found


def roc_curves(seen: Panel, ours: Name, resamples: int) -> list[Picture]:
    """One figure; none where no disease has subjects with and without it."""
    draws = task_tables.draws_for(seen, {ours}, resamples)
    mine = {fit: values for fit, values in seen.values.items() if fit.name == ours}
    areas = task_tables.scored(task_tables.of_systems(seen, {ours}), "auroc", draws)
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for (name, r, target), score in areas.items():
        if np.isfinite(score.estimate.value):
            column, number = seen.targets.index(target), seen.accelerations.index(r)
            said = f"R = {r}: {text_of(task_tables.interval(score))}"
            (values,) = (values for fit, values in mine.items() if fit.name == name)
            panels.setdefault(title_of(target), {})[said] = seen.truth[:, column], values[number, :, column]
    if not panels:
        return []
    caption = f"{ours.title}: receiver operating characteristic of each disease, with AUROC and its 95 % interval."
    return [(caption, figures_tasks.roc_curves(panels))]


# ------------------------------------------------------------------------------------------------ single subjects


def subjects(chosen: Chosen, seen: Sequence[Look], slice_order: str) -> list[Picture]:
    """Contours at each R, volume curves, and images of the chosen subjects.

    Args:
        slice_order: of the short axis, in words.
    """
    which = ", ".join(
        f"subject {n} at the {p}th ({value:.2f})"
        for n, (p, value) in enumerate(zip(chosen.percentiles, chosen.values, strict=True), 1)
    )
    who = f"Held-out subjects at these percentiles of {chosen.score} (mean over R): {which}."
    return [*contours(seen, who, slice_order), *curves(seen, who), *images(seen, who)]


def contours(seen: Sequence[Look], who: str, slice_order: str) -> list[Picture]:
    """A figure for each R: end-diastole and end-systole of the truth."""
    found: list[Picture] = []
    for r in dict.fromkeys(look.acceleration for look in seen):
        rows: dict[str, dict[str, Tile]] = {}
        for look in (look for look in seen if look.acceleration == r):
            for number, phase in enumerate(PHASES):
                tiles = tiles_of(look, number)
                if tiles:
                    rows[f"subject {look.number}, {phase.upper()}"] = tiles
        if rows:
            title = f"R = {r} (true {_true(seen, r):.2f})"
            caption = (
                f"True (solid) and predicted (dashed) contours on the fully sampled image at {title}, at the truth's "
                f"end-diastole (ED) and end-systole (ES); of the short axis the first, middle and last slice, "
                f"{slice_order}. {who}"
            )
            found.append((caption, figures_tasks.overlays(rows, title)))
    return found


def tiles_of(look: Look, phase: int) -> dict[str, Tile]:
    """Slices of one subject at end-diastole (0) or end-systole (1) of each view whose truth shows the cavity."""
    tiles: dict[str, Tile] = {}
    for view in (view for view in VIEWS if view in look.masks):
        pair = look.masks[view]
        frames = extreme_frames(pair.truth)
        if frames is None:
            continue
        for name, z in slices_of(view, pair):
            at = z, frames[phase]
            tiles[name] = Tile(look.full[view][at], pair.truth[at], pair.predicted[at])
    return tiles


def slices_of(view: str, pair: Pair) -> list[tuple[str, int]]:
    """Name and number of the slices shown: of a stack its first, middle and last, else the only one.

    They go by number: which end of the stack comes first is the source's choice, which the caption tells.
    """
    count = len(pair.truth)
    if view != "sax":
        return [(view.replace("lax_", ""), count // 2)]
    return [(f"short axis, {z + 1} of {count}", z) for z in sorted({0, count // 2, count - 1})]


def curves(seen: Sequence[Look], who: str) -> list[Picture]:
    """Volume of the LV cavity from true masks and from those predicted at each R; none where it can't be measured."""
    panels: dict[str, dict[str, np.ndarray]] = {}
    for look in seen:
        true, said = (lv_volume(look.masks, which) for which in ("truth", "predicted"))
        if true is not None and said is not None:
            panel_of = panels.setdefault(f"held-out subject {look.number}", {"true masks": true})
            panel_of[f"R = {look.acceleration}"] = said
    if not panels:
        return []
    caption = f"Volume of the left ventricle over the cycle, measured on true and on predicted masks. {who}"
    return [(caption, figures_tasks.volume_curves(panels, "LV"))]


def lv_volume(views: Mapping[str, Pair], which: str) -> np.ndarray | None:
    """Volume of the LV cavity, mL, of every frame (`metrics.volume_curves`); None: these views do not give it."""
    known = {
        view: Masks(getattr(pair, which), pair.spacing_mm, pair.contoured)
        for view, pair in views.items()
        if pair.spacing_mm is not None
    }
    return volume_curves(known).get("lv_cavity")


def images(seen: Sequence[Look], who: str) -> list[Picture]:
    """A figure for each subject: one slice and frame at every R."""
    found: list[Picture] = []
    for number in dict.fromkeys(look.number for look in seen):
        mine = [look for look in seen if look.number == number and look.images]
        if not mine:
            continue
        view = next(iter(mine[0].full))
        full = mine[0].full[view]
        z, frame = looks.place_of(full)
        rows = {
            f"R = {look.acceleration} (true {look.true_acceleration:.2f})": {
                name: each[view][z, frame] for name, each in look.images.items()
            }
            for look in mine
        }
        title = f"Held-out subject {number}"
        caption = (
            f"{title}, {view.replace('lax_', '')} slice {z + 1} of {len(full)}, frame {frame + 1} of {full.shape[1]} "
            f"(the one that differs most from the mean over the cycle): fully sampled, {', '.join(OTHERS)} "
            f"and {PREDICTED} image under one grey scale, and the predicted one's absolute error × "
            f"{figures_tasks.GAIN}. {who}"
        )
        found.append((caption, figures_tasks.image_panel(rows, full[z, frame], title)))
    return found


def _true(seen: Sequence[Look], r: int) -> float:
    """True R of the subjects shown at a nominal R: lines that exist over lines acquired, their harmonic mean."""
    each = np.array([look.true_acceleration for look in seen if look.acceleration == r])
    return float(len(each) / np.sum(1 / each))
