"""Writing a dataset: which subject goes into which shard, and what a task does to write one. Knows no Ray.

A shard's content follows from its job alone, so that it has the same bytes on any machine, at any number of workers and
after any number of restarts. Its index, written last, says that it is whole. A subject that can't be read is refused;
the reason is kept in the index, and so survives a restart too.
"""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
from pyarrow import fs

from kmtr import machine
from kmtr.config import Shards
from kmtr.data.dataset import SCHEMA_VERSION, record, shards, storage
from kmtr.data.dataset.manifest import Manifest, Shard, write_manifest
from kmtr.data.dataset.splits import SPLITS
from kmtr.data.dataset.storage import StoreError
from kmtr.data.sources.payload import check_payload
from kmtr.types import InputError, KmtrError, Study

CRASHES = 3
"""Processes that a subject may end before it is refused. Not at once: a lost node, or memory that ran out for another
task, ends whatever is under way.
"""

REPORT = "refused.json"
"""Report of a dataset, beside its manifest: subjects that are not in it and why, notes on those that are, and files of
the source that belong to no subject (`sources.unused`).
"""


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: the items (numbers) whose studies go into it."""

    name: str
    split: str
    items: tuple[int, ...]


def shard_jobs(splits: Sequence[str], rows: int) -> list[ShardJob]:
    """Items in their order over shards of each split.

    Args:
        splits: of each item.
        rows: subjects per shard.
    """
    members: dict[str, list[int]] = {name: [] for name in SPLITS}
    for item, split in enumerate(splits):
        members[split].append(item)
    return [
        ShardJob(f"{name}-{start // rows:05d}", name, tuple(items[start : start + rows]))
        for name, items in members.items()
        for start in range(0, len(items), rows)
    ]


@runtime_checkable
class Journal(Protocol):
    """Where a task says which item it is at, so that what ends its process is found by the next one."""

    def begin(self, item: int) -> int:
        """How often the item was begun without an end, this time included."""
        ...

    def end(self, item: int) -> None: ...


@dataclass(frozen=True)
class Cost:
    """Cost of a part of the work.

    Attributes:
        subjects: made and written.
        core_s: processor time of making and writing, all threads, s.
        peak_bytes: most memory that its process ever held.
    """

    subjects: int
    core_s: float
    peak_bytes: int


@dataclass(frozen=True)
class WriteShards:
    """Writes shards: skips what is finished, refuses what can't be read.

    Attributes:
        ids: pseudonym of each item.
        make: item -> Study; pure. Whatever it raises refuses that subject, not the others.
        source: how the dataset is made; part of what `shards.finished_shard` compares.
        unused: files of the source that belong to no item, as `sources.Unused` has them; for the report only.
    """

    root: str
    jobs: list[ShardJob]
    ids: list[str]
    make: Callable[[int], Study]
    settings: Shards
    source: str
    unused: tuple[dict[str, Any], ...] = ()

    def __call__(self, number: int, journal: Journal) -> tuple[Shard, dict[str, Any], Cost]:
        """The shard of one job as `shards.write_shard` returns it, and what it cost now.

        Raises:
            StoreError: it can't be written (a full disk, say).
            InputError: another command's shard lies there.
        """
        if found := self.finished(number):
            return *found, Cost(0, 0.0, 0)
        job = self.jobs[number]
        began = time.process_time()
        refused: list[dict[str, str]] = []
        try:
            shard, summary = shards.write_shard(
                self.root,
                job.name,
                job.split,
                self._studies(job, journal, refused),
                self.settings.dtype,
                self.settings.compression,
                self.made(number),
                refused,
                lambda study, error: refused.append(self._refusal(study.subject_id, error)),
            )
        except OSError as error:
            raise StoreError(
                f"shards/{job.name}: it can't be written: {storage.reason(error)}; finished shards stay, the same "
                "command goes on behind them"
            ) from None
        return shard, summary, Cost(shard.rows, time.process_time() - began, machine.peak())

    def finished(self, number: int) -> tuple[Shard, dict[str, Any]] | None:
        """A shard that an earlier run of the same command left whole."""
        return shards.finished_shard(self.root, self.jobs[number].name, self.made(number))

    def made(self, number: int) -> str:
        """Hash of all that decides a shard's content."""
        job = self.jobs[number]
        ids = [self.ids[item] for item in job.items]
        what = [self.source, SCHEMA_VERSION, self.settings.dtype, self.settings.compression, job.split, ids]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]

    def _studies(self, job: ShardJob, journal: Journal, refused: list[dict[str, str]]) -> Iterator[Study]:
        for item in job.items:
            if journal.begin(item) > CRASHES:
                reason = f"its process ended {CRASHES} times while reading it (a crash, or memory ran out)"
                refused.append({"subject": self.ids[item], "reason": reason})
            else:
                try:
                    study = self.make(item)
                    if study.subject_id != self.ids[item]:
                        raise KmtrError(f"expected the study of {self.ids[item]}, got that of {study.subject_id}")
                    for name, view in study.views.items():
                        check_payload(name, view.kspace.shape, self.settings.dtype)
                    record.check_finite(study)
                except Exception as error:
                    refused.append(self._refusal(self.ids[item], error))
                else:
                    refused.extend({"subject": study.subject_id, "note": note} for note in study.notes)
                    yield study
                    del study  # before the next is made
            journal.end(item)

    @staticmethod
    def _refusal(subject_id: str, error: Exception) -> dict[str, str]:
        return {"subject": subject_id, "reason": reason_of(error, subject_id)}


def reason_of(error: Exception, subject_id: str) -> str:
    """Why a subject was refused, in one line. What an unforeseen error says stays out: it may name patient or path."""
    if isinstance(error, KmtrError):
        return " ".join(str(error).split()).removeprefix(f"{subject_id}: ")
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without our own call
    ours = [frame for frame in frames if "kmtr" in frame.filename.split("/")] or frames
    place = f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}"
    return f"{type(error).__name__} at {place}: an error that the reader does not foresee; please report it"


def finished(write: WriteShards) -> dict[int, tuple[Shard, dict[str, Any]]]:
    """Number of a job -> its shard, of all that an earlier run left whole.

    Raises:
        InputError: another command left them.
    """
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(write.finished, range(len(write.jobs)))
        return {number: part for number, part in enumerate(found) if part}


def complete(
    write: WriteShards, parts: dict[int, tuple[Shard, dict[str, Any]]]
) -> tuple[Manifest, list[dict[str, str]]]:
    """The manifest of all shards, and before it the report of what was refused.

    Raises:
        InputError: every subject was refused.
    """
    ordered = [parts[number] for number in range(len(write.jobs))]
    entries = [entry for _, summary in ordered for entry in summary["refused"]]
    refused, notes = ([entry for entry in entries if key in entry] for key in ("reason", "note"))
    store, base = storage.open_root(write.root)
    storage.make_folder(store, base)
    report = {"subjects": len(write.ids), "refused": refused, "notes": notes, "unused": list(write.unused)}
    storage.write_atomic(store, f"{base}/{REPORT}", json.dumps(report, indent=1).encode())
    if not any(shard.rows for shard, _ in ordered):
        first = f"{refused[0]['subject']}: {refused[0]['reason']}" if refused else "got none"
        raise InputError(f"expected at least one subject that can be read, {len(refused)} refused; the first: {first}")
    _sweep(store, base)
    return write_manifest(write.root, ordered, write.settings.dtype, write.source), refused


def report(root: str) -> dict[str, Any]:
    """The report of a dataset: ``subjects``, a count, and the lists ``refused``, ``notes`` and ``unused``.

    The lists are empty where there is no report, as of datasets of an earlier version.
    """
    empty: dict[str, Any] = {"refused": [], "notes": [], "unused": []}
    store, base = storage.open_root(root)
    path = f"{base}/{REPORT}"
    return empty | json.loads(storage.read_bytes(store, path)) if storage.exists(store, path) else empty


def refused(root: str) -> list[dict[str, str]]:
    """The subjects that are not in a dataset, and why."""
    return report(root)["refused"]


def reasons(entries: Sequence[dict[str, str]], most: int = 10, key: str = "reason") -> list[str]:
    """Lines for people: each reason (or note) once, how many subjects it holds for, and one of them."""
    counts = Counter(entry[key] for entry in entries)
    example = {entry[key]: entry["subject"] for entry in reversed(entries)}
    lines = [f"{count} x {reason} (as {example[reason]})" for reason, count in counts.most_common(most)]
    return lines + ([f"and {len(counts) - most} more reasons"] if len(counts) > most else [])


def _sweep(store: fs.FileSystem, base: str) -> None:
    """Remove what killed writers left under temporary names."""
    with suppress(pa.ArrowException, OSError):  # it harms nobody where it stays
        for info in store.get_file_info(fs.FileSelector(f"{base}/shards")):
            if info.type == fs.FileType.File and info.base_name.endswith(".tmp"):
                store.delete_file(info.path)
