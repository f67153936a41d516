"""Ingestion: files of a known format to a dataset, with labels from a table."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from functools import partial
from typing import Any

from kmtr.config import RunConfig, given, override
from kmtr.config.submitted import refuse_relative, refuse_relative_under_submit
from kmtr.data import sources
from kmtr.data.dataset import splits, storage, tables
from kmtr.data.dataset.driver import write
from kmtr.types import InputError, KmtrError, Study


def ingested(
    item: int, items: list[sources.Item], labels: list[dict[str, float]], config: RunConfig, subject_key: bytes
) -> Study:
    """The study of one source item, with the labels of its row in the table.

    Raises:
        InputError: it can't be read; the line names no file.
    """
    try:
        study = sources.read(items[item], options_of(config), subject_key=subject_key)
        return dataclasses.replace(study, labels=study.labels | labels[item])
    except KmtrError as error:
        raise InputError(without_names(str(error), items[item])) from None


def options_of(config: RunConfig) -> sources.Options:
    """How the configuration wants sources to be read. Raises InputError."""
    i = config.ingest
    return sources.Options(
        i.matrix, config.seed, i.axes, i.oversampling, i.coils, int(i.gib * 2**30), i.classes, config.shards.dtype
    )


def without_names(line: str, item: sources.Item) -> str:
    """A line without the paths and file names of a patient, should a reader or a library have put one into it."""
    names = {name for file in item.files for name in (str(file), str(file.parent), file.name)}
    for name in sorted(names, key=len, reverse=True):
        line = line.replace(name, "(file)") if len(name) > 1 else line
    return line


def run(words: list[str]) -> dict[str, Any]:
    """Ingest ``FORMAT SOURCE key=value ...``, or find that it is done; what the last line on stdout says."""
    if len(words) < 2 or "=" in words[0] or "=" in words[1]:
        raise InputError(f"expected FORMAT SOURCE first, FORMAT one of {', '.join(sources.FORMATS)}; see --help")
    config = override(RunConfig(), given(words[2:]))
    refuse_relative("SOURCE", words[1])
    refuse_relative_under_submit(config)
    options_of(config)  # a slip in a key is said before any file is opened
    subject_key = os.environ.get("KMTR_SUBJECT_KEY", "kmtr").encode()
    items = sources.discover(words[0], storage.absolute(words[1]))
    ids = [sources.pseudonym(item.subject, subject_key) for item in items]
    labels = table_of(config, items)
    make = partial(ingested, items=items, labels=labels, config=config, subject_key=subject_key)
    source = made_by(config, words[0], ids, labels)
    left = sources.unused(words[0], storage.absolute(words[1]), items)
    manifest, said = write("ingest", config, ids, make, source, lambda: [splits.stratum(row) for row in labels], left)
    for view, shapes in manifest.shapes.items():
        print(f"ingest: {view} (slice coil t ky kx): " + ", ".join(" x ".join(map(str, s)) for s in shapes))
    if len(items) < splits.MIN_SPLIT_SUBJECTS and config.shards.split == "auto":
        print(f"ingest: {len(items)} subjects are too few to split; all are in train (shards.split)")
    return said


def table_of(config: RunConfig, items: list[sources.Item]) -> list[dict[str, float]]:
    """The labels of each item in the table of ingest.labels; how many matched is printed.

    Raises:
        InputError: the table is no good, or knows none of the subjects.
    """
    if not config.ingest.labels:
        if config.ingest.columns:
            raise InputError("ingest.columns: expected ingest.labels=TABLE, whose columns these are")
        return [{} for _ in items]
    table = tables.read_table(storage.absolute(config.ingest.labels), config.ingest.columns)
    labels = tables.join([item.subject for item in items], table)
    print(f"ingest: {tables.summary(labels)}; the table has {len(table)}")
    return labels


def made_by(config: RunConfig, format: str, ids: list[str], labels: list[dict[str, float]]) -> str:
    """Text of all that decides the content, without the names of patients or their files."""
    subjects = hashlib.sha256("".join(ids).encode()).hexdigest()[:16]
    i = config.ingest
    classes = f"classes={i.classes} " if i.classes else ""
    return (
        f"ingest {sources.version(format)} subjects={len(ids)} of={subjects} matrix={i.matrix} axes={i.axes} {classes}"
        f"oversampling={i.oversampling} coils={i.coils} gib={i.gib:g} seed={config.seed} labels={tables.digest(labels)}"
    )
