"""Start of training on labels: the encoder that it begins from, and what is known of the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kmtr.config import RunConfig, override, plain, typed
from kmtr.data.dataset import storage
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import Batch, Wanted
from kmtr.data.loader.masks import spacing_mm
from kmtr.data.loader.order import permutation
from kmtr.data.loader.shapes import full_shape, places_of
from kmtr.data.loader.subjects import MIN_KNOWN
from kmtr.exported import HEAD, KSPACE, WEIGHTS, Trained, read_head, read_weights, rebuilds, system_of
from kmtr.systems import Imaging, Mapped, input_of, system
from kmtr.tasks import tasks_of
from kmtr.tasks.dense import Dense
from kmtr.train.folder import IMAGE_ENCODER, Outcome, finished, run_folder
from kmtr.types import DISEASES, PHENOTYPES, InputError

MAX_AVERAGED, CHUNK = 256, 16
"""Subjects that the mean mask and the losses of constant answers are of, and how many are in memory at once."""
LACKING = {
    "": "subjects",
    "masks": "subjects with contours in the chosen views, slices and frames",
    "images": "subjects that the scanner sampled fully (of others nobody knows the image)",
}
"""`Task.needs` -> what a dataset lacks that has none."""
NONE = "none"
"""Value of `task.encoder` for a system that starts from its initial weights."""


def resolve(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The configuration with `task.encoder` as an absolute path or `NONE`; of another stage as it is.

    Raises:
        InputError: the dataset lacks what a task learns from, or the encoder is missing or of another geometry.
    """
    if config.stage != "task":
        return config
    for name, task in tasks_of(config).items():
        if not task.labels and not isinstance(task, Dense):
            raise InputError(f"task.tasks: expected tasks on labels, got {name}; pretrain with stage=masked or align")
        for label in task.labels:
            if dataset.labels.get(label, 0) < MIN_KNOWN:
                key, kind = ("task.diseases", DISEASES) if name == "diseases" else ("task.targets", PHENOTYPES)
                able = (one for one in kind if dataset.labels.get(one, 0) >= MIN_KNOWN)
                raise InputError(
                    f"{key}: expected labels that at least {MIN_KNOWN} subjects have, got {label}; the dataset has "
                    f"{', '.join(able) or 'none'}"
                )
    sees = input_of(config)
    chosen = budget(config, dataset)
    reader = dataset.reader("train", config.data)
    rows = range(len(reader)) if chosen is None else chosen.tolist()
    if sees == "full" and next(usable(config, reader, rows, "images"), None) is None:
        raise InputError(
            f"task.system: expected {LACKING['images']} for {config.task.system} on input full, got none among "
            f"{len(rows)} training subjects"
        )
    with torch.device("meta"):
        system(config.task.system).module(config)  # raises where it does not suit the matrix, or a library is missing
    learnt = tasks_of(config)
    dense = any(isinstance(task, Dense) for task in learnt.values())
    both = (Mapped, "segmentation", dense), (Imaging, "reconstruction", "reconstruction" in learnt)
    for protocol, suits, there in both:  # else weights would get no gradient
        if isinstance(system(config.task.system), protocol) and not there:
            raise InputError(
                f"task.tasks: expected {suits} among them, for which task.system={config.task.system} is, got "
                f"{','.join(learnt)}"
            )
    for name, task in learnt.items():
        task.check()
        if next(usable(config, reader, rows, task.needs), None) is None:
            raise InputError(
                f"task.tasks: expected {LACKING[task.needs]} for {name}, got none among {len(rows)} training subjects"
            )
    if config.task.encoder == NONE or not _pretrainable(config):
        return override(config, {"task.encoder": NONE})
    folder = Path(storage.absolute(config.task.encoder)) if config.task.encoder else _pretrained(config, dataset)
    if not all((folder / name).is_file() for name in (WEIGHTS, HEAD)):
        raise InputError(f"task.encoder: expected a folder with {WEIGHTS} and {HEAD}, or none, got {folder}")
    check_fits(config, folder)
    if (other := system_of(folder / HEAD)) != config.task.system:
        raise InputError(
            f"task.encoder: expected the encoder of task.system={config.task.system}, got that of {other} in {folder}; "
            f"a pretraining leaves that of images in {IMAGE_ENCODER}"
        )
    return override(config, {"task.encoder": str(folder)})


def _pretrainable(config: RunConfig) -> bool:
    """True if the run's system starts from an encoder: that of images does where one is named, or where pretraining
    with these settings has it.
    """
    named = bool(config.task.encoder) or bool(config.masked.steps and config.masked.image_weight)
    return config.task.system == KSPACE or (config.task.system == "image" and named)


def _pretrained(config: RunConfig, dataset: Dataset) -> Path:
    """Encoder of the finished pretraining with the same settings."""
    before = override(config, {"stage": "both", "task.tasks": (), "run.name": "", "run.begin": "", "run.fresh": False})
    name, folder = run_folder(before, dataset)
    done = finished(folder)
    if done is None:
        raise InputError(
            f"task.encoder: run {name} is not finished; pretrain it first, or set task.encoder to a folder or none"
        )
    return Path(done.encoder) if config.task.system == KSPACE else image_encoder(done)


def image_encoder(done: Outcome) -> Path:
    """Folder of the image encoder of a finished pretraining.

    Raises:
        InputError: it left none.
    """
    folder = Path(done.folder) / IMAGE_ENCODER
    if not (folder / HEAD).is_file():
        raise InputError(
            f"task.encoder: run {done.name} left no {IMAGE_ENCODER}: its masked.image_weight was 0, or it is of before "
            "2026-11-30; pretrain under another run.name, or begin from none"
        )
    return folder


def check_fits(config: RunConfig, folder: Path) -> None:
    """Check that an encoder's weights and tables fit the settings of a run that starts from it.

    Raises:
        InputError: names the key that differs.
    """
    known, wanted = plain(read_head(folder / HEAD)), plain(config)
    for key, value in wanted.items():
        # Acceleration, family and seed may differ: the weights fit all the same.
        if rebuilds(key) and key != "seed" and not key.startswith("sampling.") and known[key] != value:
            raise InputError(
                f"{key}: expected {typed(known[key])}, as the encoder in {folder} has it, got {typed(value)}; take its "
                "settings or another task.encoder"
            )


def tables(config: RunConfig) -> dict[str, Tensor] | None:
    """Normalisation tables of the encoder that the run starts from; None: it starts from none."""
    if config.stage != "task" or config.task.encoder == NONE:
        return None
    return read_weights(Path(config.task.encoder) / WEIGHTS)[1]


def trained_on(config: RunConfig, dataset: Dataset) -> Trained:
    """Facts that an exported model carries: counts of its training subjects, their labels and shapes."""
    reader = dataset.reader("train", config.data)
    rows, names = budget(config, dataset), labels_of(config)
    chosen = range(len(reader)) if rows is None else rows.tolist()
    counts = np.isfinite(subjects.labels_of(reader, chosen, names)).sum(0).tolist()
    shapes: dict[str, list[list[int]]] = {}
    for manifest in dataset.manifests:
        numbers = {number for shard in manifest.shards if shard.split == "train" for _, number in shard.shapes}
        for subject in (manifest.subject_shapes[number] for number in numbers):
            for view in set(config.data.views) & set(subject):
                least, most = shapes.get(view, [subject[view], subject[view]])
                shapes[view] = [list(map(min, least, subject[view])), list(map(max, most, subject[view]))]
    spacing = spacing_mm(reader.samples(chosen), config.data, full_shape(config.data))
    sizes = {view: spacing[:, at.start] for view, at in places_of(config.data, full_shape(config.data))}
    known = {view: size[size.isfinite().all(1)] for view, size in sizes.items()}
    return Trained(
        subjects=len(chosen),
        labels=dict(zip(names, counts, strict=True)),
        shapes={view: shapes[view] for view in config.data.views if view in shapes},
        dataset=dataset.digest,
        spacing_mm={view: [v.amin(0).tolist(), v.amax(0).tolist()] for view, v in known.items() if len(v)},
        slice_order=dataset.slice_order if "sax" in config.data.views else "",
        from_scratch=config.task.encoder == NONE,
        steps=config.task.steps,
    )


def labels_of(config: RunConfig) -> tuple[str, ...]:
    """Labels that the tasks of a run learn from, each once."""
    return tuple(dict.fromkeys(label for task in tasks_of(config).values() for label in task.labels))


def budget(config: RunConfig, dataset: Dataset) -> Int[np.ndarray, " chosen"] | None:
    """Training rows on whose labels the run trains, ascending; None: all of them (`task.labels` is 0, another stage).

    Of subjects that lack something for one of the tasks see `subjects.budget`. What needs no label does not go by it:
    the normalisation statistics of a run that starts from no encoder are those of all training subjects.

    Raises:
        InputError: the budget is larger than what there is, or too small for the labels or for a batch.
    """
    if config.stage != "task" or not config.task.labels:
        return None
    names, reader, batch = labels_of(config), dataset.reader("train", config.data), config.data.global_batch
    labels, learnt = subjects.labels_of(reader, range(len(reader)), names), tasks_of(config).values()
    own = [[names.index(label) for label in task.labels] for task in learnt if task.labels]
    needs = [has(config, dataset, reader, need) for need in dict.fromkeys(task.needs for task in learnt if task.needs)]
    rows = subjects.budget(config.seed, labels, np.isin(names, DISEASES), config.task.labels, own, needs)
    if len(rows) < batch and config.plan.tail == "drop":
        raise InputError(
            f"task.labels: expected at least data.global_batch={batch} subjects, got {len(rows)}; lower "
            "data.global_batch, or fill batches up with repeats that no loss counts by plan.tail=pad"
        )
    return rows


def labelled(config: RunConfig, dataset: Dataset) -> list[int]:
    """Training rows on whose labels the run trains, ascending; raises as `budget`."""
    rows = budget(config, dataset)
    return list(range(dataset.rows("train"))) if rows is None else rows.tolist()


def has(config: RunConfig, dataset: Dataset, reader: Reader, needs: str) -> Callable[[int], bool]:
    """A function: training row -> True if its subject has what a task `needs`; each is read once in a process."""
    known = _found(dataset.digest, config.data.model_dump_json(), needs)

    def found(row: int) -> bool:
        if row not in known:
            known[row] = next(_usable(config, reader, [row], needs), None) is not None
        return known[row]

    return found


@lru_cache(maxsize=4)
def _found(digest: str, data: str, needs: str) -> dict[int, bool]:
    """Rows of a dataset's training split that `has` has looked at, and its answers; `has` fills it."""
    return {}


def said_of_labels(config: RunConfig, dataset: Dataset) -> str:
    """One line that counts, of the subjects that a run learns from, those who have what each of its tasks needs.

    Masks and images of all subjects are not read for it, but those of `MAX_AVERAGED`.
    """
    chosen, reader = budget(config, dataset), dataset.reader("train", config.data)
    rows = list(range(len(reader))) if chosen is None else chosen.tolist()
    order = permutation(config.seed, 0, len(rows))
    looked = [rows[i] for i in (order[:MAX_AVERAGED] if chosen is None else order)]
    among = f"{len(looked)} looked at" if len(looked) < len(rows) else str(len(rows))
    said = []
    for name, task in tasks_of(config).items():
        if task.needs:
            found = sum(map(has(config, dataset, reader, task.needs), looked))
            said.append(f"{found} of {among} have {'contours' if task.needs == 'masks' else 'all lines'} for {name}")
        elif task.labels:
            labels = subjects.labels_of(reader, rows, task.labels)
            known = np.isfinite(labels)
            text = f"{known.any(1).sum()} of {len(rows)} have {name}"
            if name == "diseases":
                each = zip(task.labels, np.nansum(labels, axis=0), known.sum(0), strict=True)
                text += f" ({', '.join(f'{label} {ill:.0f} of {count}' for label, ill, count in each)})"
            said.append(text)
    return "; ".join(said)


def task_tables(
    config: RunConfig, reader: Reader, fitted: dict[str, Tensor], rows: Int[np.ndarray, " chosen"] | None = None
) -> dict[str, Tensor]:
    """What the tasks have to know of the training subjects, or those in `rows`, beside `fitted`: moments of labels,
    means of masks.
    """
    found, some = label_moments(config, reader, rows), range(len(reader)) if rows is None else rows.tolist()
    for task in tasks_of(config).values():
        found |= task.fit(partial(averaged, config, reader, some, task.needs), fitted | found)
    return found


def averaged(config: RunConfig, reader: Reader, rows: Sequence[int], needs: str) -> Iterator[Batch]:
    """Up to `MAX_AVERAGED` of these training subjects that have what a task `needs`, by the seed, on the CPU: what
    means are taken over.
    """
    some = list(islice(usable(config, reader, rows, needs), MAX_AVERAGED))
    for host in pipeline.read_in_order(reader, some, CHUNK, config, Wanted(masks=needs == "masks")):
        yield host.to(torch.device("cpu"))


def usable(config: RunConfig, reader: Reader, rows: Sequence[int], needs: str) -> Iterator[int]:
    """Those of the training rows that have what a task `needs`, in random order: a few among many are found."""
    return _usable(config, reader, (rows[i] for i in permutation(config.seed, 0, len(rows))), needs)


def _usable(config: RunConfig, reader: Reader, rows: Iterable[int], needs: str) -> Iterator[int]:
    if needs == "masks":
        return subjects.contoured(config.data, reader, rows)
    return subjects.complete(config.data, reader, rows) if needs == "images" else iter(rows)


def label_moments(
    config: RunConfig, reader: Reader, rows: Int[np.ndarray, " chosen"] | None = None
) -> dict[str, Tensor]:
    """``label_mean`` and ``label_sd`` of the tasks' labels over the training subjects, or those in `rows`; empty
    without such labels.
    """
    names = labels_of(config)
    if not names:
        return {}
    known = subjects.labels_of(reader, range(len(reader)) if rows is None else rows.tolist(), names)
    sd = np.nanstd(known, axis=0)
    moments = {"label_mean": np.nanmean(known, axis=0), "label_sd": np.where(sd > 0, sd, 1.0)}
    return {name: torch.from_numpy(values.astype(np.float32)) for name, values in moments.items()}
