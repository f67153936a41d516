"""Parts of a dataset, each predicted and written by one process. Knows no Ray.

A part's content follows from its job alone, so that it has the same bytes at any number of workers and after any number
of restarts. Its mark, written last, says that it is whole, and who of it was refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float
from pyarrow import fs

from kmtr.config import Data
from kmtr.data.dataset import storage
from kmtr.data.dataset.manifest import DamagedShard
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.dataset.splits import SPLITS
from kmtr.data.loader import patterns, subjects
from kmtr.data.loader.collate import collate
from kmtr.data.loader.device import HostBatch
from kmtr.data.loader.threads import in_order
from kmtr.encoder import undersampled
from kmtr.evaluate import predictions
from kmtr.evaluate.predict import dense
from kmtr.evaluate.predictions import HeldOut
from kmtr.evaluate.predictors import true_accelerations
from kmtr.inference import TaskModel
from kmtr.physics.sampling import VALIDATION
from kmtr.types import LABELS, VIEWS

PREDICTIONS, EMBEDDINGS, MARKS = "predictions", "embeddings", "parts"
"""Folders of an output."""

ALL_LINES = None
"""In place of an acceleration: every line that the source acquired."""


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one split."""

    split: str
    first: int
    count: int


def parts_of(dataset: Dataset, split: str, size: int) -> tuple[Part, ...]:
    """Parts of up to `size` subjects of a split, or of ``all``."""
    return tuple(
        Part(name, first, min(size, dataset.rows(name) - first))
        for name in (SPLITS if split == "all" else (split,))
        for first in range(0, dataset.rows(name), size)
    )


@dataclass(frozen=True)
class Job:
    """All that a process needs to know beside the model.

    Attributes:
        data: how bytes are read (checks, cache); views and shapes are the model's.
        out: folder or URI that is written to.
        accelerations: nominal R, or `ALL_LINES`.
        batch: subjects at once.
        embeddings, masks: these are written too.
        pattern: of the model's pattern file, which another node may not have (`patterns.hold`).
    """

    dataset: Dataset
    data: Data
    out: str
    parts: tuple[Part, ...]
    accelerations: tuple[int | None, ...]
    batch: int
    embeddings: bool = False
    masks: bool = False
    pattern: Bool[np.ndarray, "frame line"] | None = None


@dataclass(frozen=True)
class Done:
    """What became of a part.

    Attributes:
        subjects: predicted.
        refused: of each other ``subject`` (pseudonym, or number of the row where not even that can be read) and
            ``reason``.
        outside: subjects whose own R the model was not trained for.
        by_heads: subjects for whom heads answer what the model knows better by the areas of its masks.
        dense: arrays written, of masks and images.
        unplaced: views without NIfTI files, since the size of a pixel is not known.
        nowhere: NIfTI files without a place in the scanner.
        resized: subjects whose pixels have another size than those of training.
    """

    subjects: int
    refused: list[dict[str, str]] = field(default_factory=list)
    outside: int = 0
    by_heads: int = 0
    dense: int = 0
    unplaced: int = 0
    nowhere: int = 0
    resized: int = 0


@dataclass(frozen=True)
class _Chunk:
    """Subjects that are predicted at once; `host` is None where all of them are refused."""

    rows: list[int]
    names: list[str]
    host: HostBatch | None
    refused: list[dict[str, str]]


@dataclass(frozen=True)
class _Said:
    """Outputs for some subjects at one R, on the host."""

    numbers: dict[str, Float[np.ndarray, " subject"]]
    dense: dict[str, np.ndarray]
    vectors: Float[np.ndarray, "subject channel"] | None
    true: Float[np.ndarray, " subject"]
    measured: Bool[np.ndarray, " subject"]
    outside: Bool[np.ndarray, " subject"]
    resized: Bool[np.ndarray, " subject"]

    def of(self, chosen: Bool[np.ndarray, " subject"]) -> _Said:
        """Those of some of the subjects."""
        return _Said(
            {name: values[chosen] for name, values in self.numbers.items()},
            {name: values[chosen] for name, values in self.dense.items()},
            None if self.vectors is None else self.vectors[chosen],
            self.true[chosen],
            self.measured[chosen],
            self.outside[chosen],
            self.resized[chosen],
        )

    @property
    def finite(self) -> Bool[np.ndarray, " subject"]:
        """True where all numbers are finite, and of dense outputs some: they are NaN where nothing is there."""
        found = np.ones(len(self.true), bool)
        for values in [*self.numbers.values(), *([] if self.vectors is None else [self.vectors])]:
            found &= np.isfinite(values).reshape(len(found), -1).all(1)
        for values in self.dense.values():
            found &= np.isfinite(values).reshape(len(found), -1).any(1)
        return found


@dataclass(frozen=True)
class _Answers:
    """Subjects and what the model says of them at each R."""

    rows: list[int]
    names: list[str]
    said: dict[int | None, _Said]


class PartWriter:
    """Predicts parts of a job with one model, and writes their files."""

    def __init__(self, job: Job, model: TaskModel):
        self.job, self.model = job, model
        patterns.hold(model.config.sampling, job.pattern)
        self.configs = {r: undersampled(model.config, r) for r in job.accelerations}
        self._reasons: dict[str, str] = {}

    def __call__(self, number: int) -> Done:
        """Write one part: tables first, then its mark.

        Raises:
            StoreError: something can't be read or written that may work later.
        """
        part = self.job.parts[number]
        reader = self.job.dataset.reader(part.split, self.job.data)
        refused: list[dict[str, str]] = []
        kept: list[_Answers] = []
        with ExitStack() as files:
            tables = dense.Tables(self.job.out, number, self.model.config.data, files)
            for chunk in self._chunks(reader, part):
                answers, unsaid = self._answers(chunk)
                refused += chunk.refused + unsaid
                if self.job.masks and answers.rows:
                    meta, before = reader.samples(answers.rows).meta, sum(len(one.rows) for one in kept)
                    for r, said in answers.said.items():
                        tables.add(answers.names, meta, r or 1, said.true, said.dense, before)
                kept.append(replace(answers, said={r: replace(said, dense={}) for r, said in answers.said.items()}))
        self._write(number, reader, kept)
        names = [name for answers in kept for name in answers.names]
        measured = [np.all([said.measured for said in one.said.values()], axis=0) for one in kept if one.rows]
        by_heads = sum(int((~one).sum()) for one in measured)
        outside, resized = (
            sum(int(np.any([getattr(said, what) for said in one.said.values()], axis=0).sum()) for one in kept)
            for what in ("outside", "resized")
        )
        done = Done(len(names), refused, outside, by_heads, tables.written, tables.unplaced, tables.nowhere, resized)
        self._put(f"{MARKS}/{number:05d}.json", json.dumps(asdict(done), indent=1).encode())
        return done

    def _chunks(self, reader: Reader, part: Part) -> Iterator[_Chunk]:
        """The subjects of a part, read ahead by a thread."""
        last = part.first + part.count
        starts = range(part.first, last, self.job.batch)
        yield from in_order(lambda at: self._read(reader, range(at, min(at + self.job.batch, last))), starts, 1, 1)

    def _read(self, reader: Reader, rows: range) -> _Chunk:
        """Some subjects; those that are damaged or do not fit are refused, the others are read all the same."""
        names: dict[int, str] = {}
        reasons: dict[int, str] = {}
        for row in rows:
            names[row], reasons[row] = self._known(reader, row)
        good = [row for row in rows if not reasons[row]]
        host = None
        try:
            host = self._collated(reader, good)
        except DamagedShard:
            reasons |= {row: self._damage(reader, row) for row in good}
            good = [row for row in rows if not reasons[row]]
            host = self._collated(reader, good)
        refused = [{"subject": names[row], "reason": reason} for row, reason in reasons.items() if reason]
        return _Chunk(good, [names[row] for row in good], host, refused)

    def _known(self, reader: Reader, row: int) -> tuple[str, str]:
        """Pseudonym of a subject, and why the model refuses it by its shapes."""
        try:
            meta = reader.samples([row]).meta
        except DamagedShard as error:
            return reader.pseudonym(row) or f"row {row} of {reader.split}", str(error)
        columns = {view: meta.column(f"shape_{view}")[0].as_py() for view in VIEWS}
        shapes = {view: shape for view, shape in columns.items() if shape is not None}
        if (key := str(shapes)) not in self._reasons:
            found = (self.model.misfit(shapes, r) for r in self.job.accelerations)
            self._reasons[key] = next(filter(None, found), "")
        return str(meta.column("subject_id")[0].as_py()), self._reasons[key]

    def _collated(self, reader: Reader, rows: list[int]) -> HostBatch | None:
        if not rows:
            return None
        config = self.configs[self.job.accelerations[0]]
        return collate(reader.samples(rows), config, wanted=self.model.wanted, purpose=VALIDATION)

    def _damage(self, reader: Reader, row: int) -> str:
        try:
            self._collated(reader, [row])
        except DamagedShard as error:
            return str(error)
        return ""

    def _answers(self, chunk: _Chunk) -> tuple[_Answers, list[dict[str, str]]]:
        """What the model says of those subjects for whom all numbers are finite, and the others."""
        if chunk.host is None:
            return _Answers([], [], {}), []
        said = {r: self._said(replace(chunk.host, config=config), r) for r, config in self.configs.items()}
        finite = np.all([one.finite for one in said.values()], axis=0)
        good = np.flatnonzero(finite)
        reason = "expected finite predictions, got others; the subject's k-space may be damaged"
        others = [{"subject": chunk.names[i], "reason": reason} for i in np.flatnonzero(~finite)]
        answers = _Answers(
            [chunk.rows[i] for i in good],
            [chunk.names[i] for i in good],
            {r: one.of(finite) for r, one in said.items()},
        )
        return answers, others

    def _said(self, host: HostBatch, acceleration: int | None) -> _Said:
        batch = host.to(self.model.device, self.model.readout)
        known = "" if acceleration is None else self.model.doubt(acceleration)  # the command says it of all
        said, measured = self.model.answers(batch)
        outputs = {name: value.cpu() for name, value in said.items()}
        vectors = self.model.embed(batch).float().cpu().numpy() if self.job.embeddings else None
        return _Said(
            {name: value.double().numpy() for name, value in outputs.items() if value.ndim == 1},
            {name: value.numpy() for name, value in outputs.items() if value.ndim > 1 and self.job.masks},
            vectors,
            true_accelerations(batch),
            measured.numpy(),
            np.array([doubt not in ("", known) for doubt in self.model.doubts(batch, acceleration)]),
            np.array([bool(warning) for warning in self.model.sizes(batch)]),
        )

    def _write(self, number: int, reader: Reader, kept: Sequence[_Answers]) -> None:
        """The tables of predictions and of vectors: R by R, subjects in their order."""
        rows = [row for answers in kept for row in answers.rows]
        names = tuple(name for answers in kept for name in answers.names)
        parts: list[pa.Table] = []
        vectors: list[pa.Table] = []
        for r in self.job.accelerations if rows else ():
            said = [answers.said[r] for answers in kept if answers.rows]
            targets = tuple(said[0].numbers)
            true = np.concatenate([one.true for one in said])
            values = [np.concatenate([one.numbers[target] for one in said]) for target in targets]
            if targets:
                held_out = HeldOut(names, targets, truth_of(reader, rows, targets))
                measured = np.concatenate([one.measured for one in said])
                parts.append(self._rows(held_out, np.stack(values, axis=1), r, true, measured))
            found = [one.vectors for one in said if one.vectors is not None]
            if found:
                vectors.append(vector_table(names, r or 1, true, np.concatenate(found)))
        self._put(f"{PREDICTIONS}/part-{number:05d}.parquet", predictions.encoded(predictions.joined(parts)))
        if vectors:
            self._put(f"{EMBEDDINGS}/part-{number:05d}.parquet", dense.parquet(pa.concat_tables(vectors)))

    def _rows(
        self, held_out: HeldOut, values: np.ndarray, r: int | None, true: np.ndarray, measured: np.ndarray
    ) -> pa.Table:
        """Rows of the heads, and under names of their own of what areas of masks answer, alone or with the head."""
        trained, areas = self.model.trained, self.model.areas
        name = predictions.model_name(self.model.config, trained.from_scratch)
        named = dict.fromkeys(areas.labels if areas else (), predictions.by_areas(name))
        named |= dict.fromkeys(next(iter(areas.blends.values())) if areas else (), predictions.together(name))
        whose = [named.get(target, name) for target in held_out.targets]
        about: dict[str, Any] = {"acceleration": r or 1, "seed": self.model.config.seed, "labels": trained.subjects}
        parts = []
        for who in dict.fromkeys((name, *named.values())):
            mine = np.array([[who == (one if known else name) for one in whose] for known in measured])
            said = np.where(mine, values, np.nan)
            parts.append(predictions.rows(who, held_out, said, true_acceleration=true, **about))
        return predictions.joined(parts)

    def _put(self, name: str, content: bytes) -> None:
        put(self.job.out, name, content)


def truth_of(reader: Reader, rows: Sequence[int], targets: Sequence[str]) -> Float[np.ndarray, "subject target"]:
    """Labels of these rows in their units; NaN: unknown, or no label but a score or a volume of a mask."""
    found = np.full((len(rows), len(targets)), np.nan)
    known = [i for i, target in enumerate(targets) if target in LABELS]
    if known:
        found[:, known] = subjects.labels_of(reader, rows, [targets[i] for i in known])
    return found


def vector_table(
    names: Sequence[str],
    acceleration: int,
    true: Float[np.ndarray, " subject"],
    vectors: Float[np.ndarray, "subject channel"],
) -> pa.Table:
    """Rows of the table of embeddings: pseudonym, nominal and true R, float32 vector."""
    columns = {
        "subject": pa.array(names, pa.string()),
        "acceleration": pa.array(np.full(len(names), acceleration, np.int32)),
        "true_acceleration": pa.array(true),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
    }
    return pa.table(columns)


def put(out: str, name: str, content: bytes) -> None:
    """Write a file of an output, the whole of it or nothing."""
    store, base = storage.open_root(out)
    storage.make_folder(store, f"{base}/{name}".rpartition("/")[0])
    storage.write_atomic(store, f"{base}/{name}", content)


def finished(job: Job) -> dict[int, Done]:
    """Number of a part -> what became of it, of all that an earlier run left whole."""
    store, base = storage.open_root(job.out)

    def mark(number: int) -> Done | None:
        path = f"{base}/{MARKS}/{number:05d}.json"
        return Done(**json.loads(storage.read_bytes(store, path))) if storage.exists(store, path) else None

    with ThreadPoolExecutor(16) as pool:
        return {number: done for number, done in enumerate(pool.map(mark, range(len(job.parts)))) if done}


def sweep(out: str) -> None:
    """Remove what killed processes left under temporary names."""
    store, base = storage.open_root(out)
    with suppress(pa.ArrowException, OSError):  # it harms nobody where it stays
        for info in store.get_file_info(fs.FileSelector(base, recursive=True)):
            if info.type == fs.FileType.File and info.base_name.endswith(".tmp"):
                store.delete_file(info.path)
