"""python jobs/ingest.py FORMAT SOURCE [key=value ...]      nifti | dicom | cmrxrecon | ismrmrd -> data.root

SOURCE is a file or a folder of them. Subjects get pseudonyms by a keyed hash; KMTR_SUBJECT_KEY is the key (keep it: the
same key gives the same pseudonyms). Fewer than 20 subjects are not split (shards.split).

A subject that can't be read is refused and listed in refused.json beside the data, by its pseudonym; the others go on.
So are notes on subjects that were read, and the files of SOURCE that belong to no subject, by number.
Killed at any time, the same command goes on behind the finished shards and ends with the same bytes.

When subjects were added to SOURCE, write it to another folder with shards.split_from=OLD_DATASET: whoever was in that
one keeps the split, so that nobody moves between training and test.

ingest.labels=TABLE (CSV or Parquet) joins phenotypes, diseases and covariates by the source's own name of a subject,
before the pseudonym; ingest.columns says which column is which. They go before what contours tell."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from functools import partial
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs._dataset import write
from jobs._main import main, refuse_relative_under_submit
from kmtr.config import RunConfig, override
from kmtr.data import sources, splits, storage, tables
from kmtr.types import InputError, KmtrError, Study


def ingested(
    item: int, items: list[sources.Item], labels: list[dict[str, float]], config: RunConfig, subject_key: bytes
) -> Study:
    """The study of one source item, with the labels of its row in the table.

    Raises:
        InputError: it can't be read; the line names no file.
    """
    i = config.ingest
    options = sources.Options(
        i.matrix, config.seed, i.axes, i.oversampling, i.coils, int(i.gib * 2**30), dtype=config.shards.dtype
    )
    try:
        study = sources.read(items[item], options, subject_key=subject_key)
        return dataclasses.replace(study, labels=study.labels | labels[item])
    except KmtrError as error:
        raise InputError(without_names(str(error), items[item])) from None


def without_names(line: str, item: sources.Item) -> str:
    """A line without the paths and file names of a patient, should a reader or a library have put one into it."""
    names = {name for file in item.files for name in (str(file), str(file.parent), file.name)}
    for name in sorted(names, key=len, reverse=True):
        line = line.replace(name, "(file)") if len(name) > 1 else line
    return line


def run(words: list[str]) -> dict[str, Any]:
    if len(words) < 2 or "=" in words[0] or "=" in words[1]:
        raise InputError(f"expected FORMAT SOURCE first, FORMAT one of {', '.join(sources.FORMATS)}; see --help")
    changes: dict[str, Any] = {}
    for word in words[2:]:
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"expected key=value, got {word!r}")
        changes[key] = value
    config = override(RunConfig(), changes)
    refuse_relative_under_submit(config)
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
    """What decides the content, without the names of patients or their files."""
    subjects = hashlib.sha256("".join(ids).encode()).hexdigest()[:16]
    i = config.ingest
    return (
        f"ingest {sources.version(format)} subjects={len(ids)} of={subjects} matrix={i.matrix} axes={i.axes} "
        f"oversampling={i.oversampling} coils={i.coils} gib={i.gib:g} seed={config.seed} labels={tables.digest(labels)}"
    )


if __name__ == "__main__":
    main(__doc__ or "", run)
