"""Prediction as a command: what is asked for and refused, the parts that are left, what is said at the end."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kmtr import tracking
from kmtr.config import RunConfig, given, override, plain, typed
from kmtr.config.submitted import refuse_relative, refuse_relative_under_submit
from kmtr.data.dataset import storage, writing
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import patterns
from kmtr.data.sources import optional
from kmtr.evaluate.predict import parts
from kmtr.evaluate.predict.parts import PREDICTIONS, Done, Job
from kmtr.evaluate.predict.ray import predicted, workers_of
from kmtr.exported import MODEL_HEAD, model_files
from kmtr.inference import UNMEASURED, TaskModel, load_model
from kmtr.progress import Bar
from kmtr.ray_start import start_ray
from kmtr.train.room import refuse_missing_gpu, uses_gpus
from kmtr.types import InputError, KmtrError

BEGUN = "predict.json"
FORMAT = 2
"""Format of `BEGUN` and of the marks; an output of another one is refused."""
_DECIDE = ("split", "accelerations", "batch", "embeddings", "masks", "rows")
"""Settings that decide what is written."""


def run(words: list[str]) -> dict[str, Any]:
    """Predict ``MODEL key=value ...``, or find that it is done; what the last line on stdout says."""
    if not words or "=" in words[0]:
        raise InputError("expected MODEL first, a folder (runs/RUN/model) or models:/NAME/VERSION; see --help")
    config = override(RunConfig(), given(words[1:]))
    refuse_relative("MODEL", words[0])
    refuse_relative_under_submit(config)
    if not config.predict.out:
        raise InputError("predict.out: expected a folder or URI for the predictions, got none")
    model, files = opened(words[0], config)
    root = storage.absolute(config.data.root)
    job = job_of(override(config, {"data.root": root}), model, Dataset.of(root))
    begin(job.out, identity(config, files, job.dataset))
    done = parts.finished(job)
    return predict(config, job, files, done)


def opened(asked: str, config: RunConfig) -> tuple[TaskModel, dict[str, bytes]]:
    """A model, and the content of the files of its folder, by name.

    Args:
        asked: a folder, or ``models:/...`` of the registry in `tracking.uri`.

    Raises:
        InputError: there is none, or its files do not fit each other.
    """
    with tempfile.TemporaryDirectory() as place:
        if asked.startswith("models:"):
            folder = tracking.fetch(tracking.tracking_uri(config), asked, Path(place))
        else:
            folder = Path(asked)
        model, head = load_model(folder), json.loads((folder / MODEL_HEAD).read_text())
        return model, {name: (folder / name).read_bytes() for name in model_files(head)}


def job_of(config: RunConfig, model: TaskModel, dataset: Dataset) -> Job:
    """The job, and what there is to say about it before it starts.

    Raises:
        InputError: no subject of the dataset fits the model, there is no such R, or nibabel is missing for masks.
    """
    asked = config.predict
    accelerations: tuple[int | None, ...] = asked.accelerations or (parts.ALL_LINES,)
    job = Job(
        dataset,
        config.data,
        storage.absolute(asked.out),
        parts.parts_of(dataset, asked.split, asked.rows),
        accelerations,
        asked.batch,
        asked.embeddings,
        asked.masks,
        patterns.carried(model.config.sampling) if asked.accelerations else None,
    )
    if asked.masks:
        optional("nibabel")
    if not job.parts:
        raise InputError(f"predict.split: expected subjects in {asked.split}, the dataset has none")
    views = model.config.data.views
    if missing := [view for view in views if view not in dataset.shapes]:
        raise InputError(
            f"data.root: expected the model's views {','.join(views)}, the dataset has no {missing[0]}; it has "
            f"{','.join(dataset.shapes)}"
        )
    reasons = misfits(model, dataset, accelerations)
    if all(reasons):
        raise InputError(f"data.root: no subject fits the model: {reasons[0]}")
    if any(reasons):
        print(f"predict: note: subjects of some shapes will be refused, as: {next(filter(None, reasons))}")
    for r in asked.accelerations:
        if said := model.doubt(r):
            print(f"predict: note: {said}")
    order = model.trained.slice_order
    if order and order != dataset.slice_order:
        print(f"predict: note: the model was trained on short-axis slices {order}, these are {dataset.slice_order}")
    if own := sorted(dataset.undersampled & set(views)):
        print(
            f"predict: note: subjects whose {', '.join(own)} is undersampled keep their own lines, whatever R is asked"
        )
    return job


def misfits(model: TaskModel, dataset: Dataset, accelerations: Sequence[int | None]) -> list[str]:
    """Why the model refuses each of the dataset's different shapes of a subject; empty: it does not."""
    return [
        next(filter(None, (model.misfit(shapes, r) for r in accelerations)), "")
        for manifest in dataset.manifests
        for shapes in manifest.subject_shapes
    ]


def identity(config: RunConfig, files: dict[str, bytes], dataset: Dataset) -> dict[str, Any]:
    """All that decides what is written."""
    settings = {key: value for key, value in plain(config).items() if key in {f"predict.{name}" for name in _DECIDE}}
    model = hashlib.sha256(b"".join(hashlib.sha256(files[name]).digest() for name in sorted(files)))
    return {"format": FORMAT, "MODEL": model.hexdigest(), "data.root": dataset.digest} | settings


def begin(out: str, wanted: dict[str, Any]) -> None:
    """Begin an output, or find it begun.

    Raises:
        InputError: it was begun with another model, dataset or setting, which the line names.
    """
    store, base = storage.open_root(out)
    path = f"{base}/{BEGUN}"
    if not storage.exists(store, path):
        parts.put(out, BEGUN, json.dumps(wanted, indent=1).encode())
        return
    known = json.loads(storage.read_bytes(store, path))
    for key, value in wanted.items():
        if known.get(key) != value:
            before, now = (typed(one)[:16] or "none" for one in (known.get(key), value))
            raise InputError(
                f"predict.out: {storage.shown(out)} was begun with {key} {before}, got {now}; take another predict.out"
            )


def predict(config: RunConfig, job: Job, files: dict[str, bytes], done: dict[int, Done]) -> dict[str, Any]:
    """Predict the parts that are left, and say what became of all.

    Args:
        done: parts of an earlier run; those of this one are added.
    """
    total, kept = (sum(job.parts[number].count for number in some) for some in (range(len(job.parts)), done))
    missing = [number for number in range(len(job.parts)) if number not in done]
    if done:
        print(f"predict: {len(done)} of {len(job.parts)} parts ({kept} of {total} subjects) are finished, kept")
    said: dict[str, Any] = {"parts": len(job.parts), "computed": len(missing)}
    if missing:
        start_ray()
        refuse_missing_gpu(config.train.device)
        gpu = uses_gpus(config.train.device)
        workers = workers_of(config.predict.workers, gpu)
        bar, began, now = Bar("predict: subjects"), time.perf_counter(), kept
        for number, one in predicted(job, files, missing, workers, gpu):
            done[number] = one
            now += job.parts[number].count
            bar(now, total)
        seconds = time.perf_counter() - began
        said |= {"workers": workers, "subjects_per_s": round((total - kept) / seconds, 2)}
        where = f"{workers} {'GPU' if gpu else 'CPU'} process(es)"
        print(f"predict: {total - kept} subjects in {seconds:.0f} s on {where}: {said['subjects_per_s']} subjects/s")
    return finish(job, [done[number] for number in range(len(job.parts))]) | said


def finish(job: Job, done: Sequence[Done]) -> dict[str, Any]:
    """Write who was refused, and say it.

    Raises:
        KmtrError: all were.
    """
    refused = [entry for one in done for entry in one.refused]
    subjects = sum(one.subjects for one in done)
    report = {"subjects": subjects + len(refused), "refused": refused}
    parts.put(job.out, writing.REPORT, json.dumps(report, indent=1).encode())
    parts.sweep(job.out)
    if refused:
        print(f"predict: {len(refused)} of {report['subjects']} subjects refused, all of them in {writing.REPORT}:")
        for line in writing.reasons(refused):
            print(f"  {line}")
    if outside := sum(one.outside for one in done):
        print(f"predict: note: {outside} subjects have an R that the model was not trained for")
    if resized := sum(one.resized for one in done):
        print(f"predict: note: {resized} subjects have pixels of another size than the model was trained on")
    if by_heads := sum(one.by_heads for one in done):
        print(f"predict: note: of {by_heads} subjects {UNMEASURED}: the model's heads answer all of them")
    if nowhere := sum(one.nowhere for one in done):
        print(
            f"predict: note: {nowhere} NIfTI files have no place in the scanner: the source does not tell it, or "
            "it was ingested by an earlier version"
        )
    if unplaced := sum(one.unplaced for one in done):
        print(f"predict: note: no NIfTI file of {unplaced} views, the size of whose pixels the source does not tell")
    if job.masks and not any(one.dense for one in done):
        print("predict: note: the model has no masks or images, so predict.masks=true wrote none")
    if not subjects:
        raise KmtrError(
            f"predict: none of {len(refused)} subjects could be predicted; the first: {refused[0]['reason']}"
        )
    out = storage.shown(job.out)
    print(f"  predictions  {out}/{PREDICTIONS}")
    return {"out": out, "predictions": f"{out}/{PREDICTIONS}", "subjects": subjects, "refused": len(refused)}
