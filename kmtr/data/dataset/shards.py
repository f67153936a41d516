"""The files of a dataset: Parquet shards, one row per subject, beside ``manifest.json`` (`kmtr.data.dataset.manifest`).

What a row holds says `kmtr.data.dataset.record`. Payloads are `large_binary` columns, uncompressed (or LZ4), without
dictionary or statistics: a view that is not read costs nothing. Pages carry checksums. Files are written under a
temporary name and renamed.

Beside each shard lies its index: the small columns of all rows and where their payloads are (``<name>.index``, Arrow
IPC). It is derived from the shard, checked against it at each read, and made anew where it is missing. It is written
after the shard: a job that was killed goes on behind the shards that have theirs.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kmtr.data.dataset import pages, storage
from kmtr.data.dataset.manifest import Manifest, Shard, count_run, runs_of, shard_of
from kmtr.data.dataset.record import current, schema, to_row
from kmtr.types import LABELS, VIEWS, InputError, Study

ROW_GROUP_BYTES = 1 << 20
"""Subjects smaller than this share a row group, since a row group is the unit of reading."""


# ------------------------------------------------------------------------------------------------------------- files

PAYLOADS = tuple(f"{kind}_{view}" for kind in ("kspace", "segmentation") for view in VIEWS)


def write_shard(
    root: str,
    name: str,
    split: str,
    studies: Iterable[Study],
    dtype: str,
    compression: str = "none",
    made: str = "",
    refused: Sequence[dict[str, str]] = (),
    refuse: Callable[[Study, Exception], None] | None = None,
) -> tuple[Shard, dict[str, Any]]:
    """Write one shard, whole or not at all, and its index, which makes a rerun skip it.

    Args:
        compression: of k-space, ``none`` or ``lz4``.
        made: what decides the content; `finished_shard` refuses to go on with another.
        refused: subjects that are not in it, and why; may grow while `studies` is drawn from. Kept in the index.
        refuse: told of a study that can't be encoded, which then is not in the shard. None: the error is raised.

    Returns:
        The shard (0 rows: no file was written) and a summary: subject shapes, labels, undersampled, made, refused.
    """
    tally = _Tally()

    def rows(studies: Iterable[Study]) -> Iterator[tuple[dict[str, Any], int]]:
        for study in studies:
            try:
                row = to_row(study, dtype)
            except Exception as error:
                if refuse is None:
                    raise
                refuse(study, error)
                continue
            tally.add(study, row)
            yield row, payload_bytes(study, dtype)

    encoded = rows(studies)
    first = next(encoded, None)
    if first is None:
        shard = Shard(f"shards/{name}.parquet", split, 0, 0, 0, "")
        if not refused:
            return shard, tally.summary(made, refused)
        return _with_index(root, shard, schema(dtype).empty_table(), tally.summary(made, refused))
    with storage.writing(root, f"shards/{name}.parquet") as sink:
        hashing = _Hashing(sink)
        with _writer(hashing, dtype, compression) as writer:
            for group in _groups(chain([first], encoded)):
                writer.write_table(pa.Table.from_pylist(group, schema=schema(dtype)))
        sink.flush()
        file = pq.ParquetFile(sink.name)
        index = index_of(file)
        groups = pages.group_rows(file.metadata)
    shard = Shard(
        name=f"shards/{name}.parquet",
        split=split,
        rows=len(index),
        row_groups=sum(n for n, _ in groups),
        bytes=hashing.bytes,
        sha256=hashing.sha256.hexdigest(),
        groups=runs_of(groups),
        shapes=runs_of(tally.shapes),
    )
    return _with_index(root, shard, index, tally.summary(made, refused))


class _Tally:
    """Counts of the rows of a shard, taken while they are written."""

    def __init__(self) -> None:
        self.subject_shapes: list[dict[str, list[int]]] = []
        self.labels = dict.fromkeys(LABELS, 0)
        self.undersampled: set[str] = set()
        self.shapes: list[list[int]] = []

    def add(self, study: Study, row: dict[str, Any]) -> None:
        shape = {view_name: list(view.kspace.shape) for view_name, view in study.views.items()}
        if shape not in self.subject_shapes:
            self.subject_shapes.append(shape)
        count_run(self.shapes, self.subject_shapes.index(shape))
        self.undersampled.update(view_name for view_name, view in study.views.items() if view.sampled is not None)
        for label in LABELS:
            self.labels[label] += row[label] is not None

    def summary(self, made: str, refused: Sequence[dict[str, str]]) -> dict[str, Any]:
        return {
            "subject_shapes": self.subject_shapes,
            "labels": {k: n for k, n in self.labels.items() if n},
            "undersampled": sorted(self.undersampled),
            "made": made,
            "refused": list(refused),
        }


def _groups(rows: Iterable[tuple[dict[str, Any], int]]) -> Iterator[list[dict[str, Any]]]:
    """Rows of at most ROW_GROUP_BYTES together, larger ones by themselves: never more than that is held in memory."""
    pending: list[dict[str, Any]] = []
    held = 0
    for row, size in rows:
        if pending and held + size > ROW_GROUP_BYTES:
            yield pending
            pending, held = [], 0
        pending.append(row)
        held += size
    if pending:
        yield pending


def _with_index(root: str, shard: Shard, index: pa.Table, summary: dict[str, Any]) -> tuple[Shard, dict[str, Any]]:
    """Write the index of a shard that lies there whole."""
    content = _index_bytes(index, shard, summary)
    store, base = storage.open_root(root)
    storage.make_folder(store, f"{base}/shards")
    storage.write_atomic(store, f"{base}/{index_name(shard.name)}", content)
    return replace(shard, index=hashlib.sha256(content).hexdigest()), summary


def payload_bytes(study: Study, dtype: str) -> int:
    """Bytes of a study's k-space as stored."""
    return sum(view.kspace.size for view in study.views.values()) * 2 * np.dtype(dtype).itemsize


def finished_shard(root: str, name: str, made: str = "") -> tuple[Shard, dict[str, Any]] | None:
    """Result of `write_shard` in an earlier run, or None.

    Raises:
        InputError: it was written with another `made`.
    """
    store, base = storage.open_root(root)
    path = f"{base}/shards/{name}.index"
    if not storage.exists(store, path):
        return None
    content = storage.read_bytes(store, path)
    with pa.ipc.open_file(pa.py_buffer(content)) as file:
        summary = json.loads(file.schema.metadata[b"kmtr.summary"])
    shard = shard_of(summary.pop("shard") | {"index": hashlib.sha256(content).hexdigest()})
    if made and summary.get("made") != made:
        raise InputError(
            f"data.root: {storage.shown(root)} holds the unfinished dataset of another command or "
            f"version (shards/{name}); choose "
            "another folder, or remove that one"
        )
    return (shard, summary) if not shard.rows or storage.exists(store, f"{base}/{shard.name}") else None


def stored_index(root: str, shard: Shard) -> pa.Table | None:
    """The index beside a shard, brought up to date; None where there is none that fits."""
    store, base = storage.open_root(root)
    with suppress(pa.ArrowException, OSError):  # derived data: what can't be read is made anew
        content = storage.read_bytes(store, f"{base}/{index_name(shard.name)}")
        if hashlib.sha256(content).hexdigest() == shard.index:
            with pa.ipc.open_file(pa.py_buffer(content)) as file:
                return current(file.read_all())
    return None


def splits_of(root: str, manifest: Manifest) -> dict[str, str]:
    """Pseudonym -> split of all subjects of a dataset.

    Raises:
        InputError: a shard can't be read.
    """

    def of(shard: Shard) -> dict[str, str]:
        index = stored_index(root, shard)
        if index is None:
            store, base = storage.open_root(root)
            try:
                with store.open_input_file(f"{base}/{shard.name}") as file:
                    index = pq.read_table(file, columns=["subject_id"], use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{shard.name}: expected a shard, got: {storage.reason(error)}; restore it") from None
        return dict.fromkeys(index.column("subject_id").to_pylist(), shard.split)

    found: dict[str, str] = {}
    with ThreadPoolExecutor(16) as pool:
        for some in pool.map(of, manifest.shards):
            found |= some
    return found


def index_name(shard: str) -> str:
    """Name of the index beside a shard."""
    return shard.removesuffix(".parquet") + ".index"


def index_of(file: pq.ParquetFile) -> pa.Table:
    """All small columns of a shard and ``place_<payload>`` (start and bytes of a page, -1 where pyarrow must read)."""
    names = file.schema_arrow.names
    payloads = [name for name in PAYLOADS if name in names]
    index = file.read(columns=[name for name in names if name not in payloads], use_threads=False)
    for name, places in pages.locate(file, payloads).items():
        values = pa.FixedSizeListArray.from_arrays(pa.array(places.ravel()), 2)
        index = index.append_column(f"place_{name}", values)
    return index.combine_chunks()


def _index_bytes(index: pa.Table, shard: Shard, summary: dict[str, Any]) -> bytes:
    metadata = dict(index.schema.metadata) | {b"kmtr.summary": json.dumps({"shard": asdict(shard)} | summary).encode()}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, index.schema.with_metadata(metadata)) as writer:
        writer.write_table(index.replace_schema_metadata(metadata))
    return sink.getvalue().to_pybytes()


class _Hashing(io.RawIOBase):
    """A file that counts and hashes what goes through."""

    def __init__(self, sink: Any):
        self.sink, self.sha256, self.bytes = sink, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sink.write(data)
        self.sha256.update(data)
        self.bytes += len(data)
        return len(data)


def _writer(sink: Any, dtype: str, compression: str) -> pq.ParquetWriter:
    codecs = {f.name: "NONE" for f in schema(dtype)} | {f"segmentation_{v}": "LZ4" for v in VIEWS}
    codecs |= {f"kspace_{v}": compression.upper() for v in VIEWS}
    return pq.ParquetWriter(
        sink,
        schema(dtype),
        compression=codecs,
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
