"""A dataset on disk: Parquet shards, one row per subject, and ``manifest.json``.

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
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kmtr.data.dataset import pages, storage
from kmtr.data.dataset.record import (  # noqa: F401 (a dataset's rows are part of what this module offers)
    SCHEMA_VERSION,
    check_finite,
    check_payload,
    check_version,
    columns_of,
    current,
    raw_kspace,
    schema,
    stored_dtype,
    to_row,
    to_study,
    unpack,
)
from kmtr.types import LABELS, VIEWS, InputError, KmtrError, Study

ROW_GROUP_BYTES = 1 << 20
"""Subjects smaller than this share a row group, since a row group is the unit of reading."""


class DamagedShard(KmtrError):
    """A shard that is not what the manifest says. It would be so again: never retried."""


@dataclass(frozen=True)
class Shard:
    """One Parquet file: name relative to the dataset's root, and what it must be.

    Attributes:
        index: SHA-256 of the index beside it.
        groups: row groups in file order, as runs of (row groups, rows in each).
        shapes: shapes of the rows in file order, as runs of (rows, index into `Manifest.subject_shapes`).
    """

    name: str
    split: str
    rows: int
    row_groups: int
    bytes: int
    sha256: str
    index: str = ""
    groups: tuple[tuple[int, int], ...] = ()
    shapes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Manifest:
    """What a dataset holds.

    Attributes:
        shards: in the order that numbers the rows of a split.
        subject_shapes: the different shapes of a whole subject: view -> ``slice coil t ky kx``. `Shard.shapes` counts
            in them.
        labels: label -> number of subjects that have it.
        undersampled: views in which some source was undersampled.
        source: how the dataset was made.
    """

    dtype: str
    shards: tuple[Shard, ...]
    subject_shapes: tuple[dict[str, list[int]], ...]
    labels: dict[str, int] = field(default_factory=dict)
    undersampled: tuple[str, ...] = ()
    source: str = ""
    schema_version: int = SCHEMA_VERSION

    def rows(self, split: str) -> int:
        return sum(s.rows for s in self.shards if s.split == split)

    @property
    def shapes(self) -> dict[str, list[list[int]]]:
        """View -> the different ``slice coil t ky kx`` shapes in it."""
        views: dict[str, list[list[int]]] = {}
        for subject in self.subject_shapes:
            for view, shape in subject.items():
                if shape not in views.setdefault(view, []):
                    views[view].append(shape)
        return {view: sorted(shapes) for view, shapes in views.items()}

    @property
    def digest(self) -> str:
        """Identity of the data: SHA-256 over the shards' own."""
        return digest_of(shard.split + shard.sha256 for shard in self.shards)


def digest_of(parts: Iterable[str]) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()


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
    subject_shapes: list[dict[str, list[int]]] = []
    labels = dict.fromkeys(LABELS, 0)
    undersampled: set[str] = set()
    shapes: list[list[int]] = []

    def summary() -> dict[str, Any]:
        return {
            "subject_shapes": subject_shapes,
            "labels": {k: n for k, n in labels.items() if n},
            "undersampled": sorted(undersampled),
            "made": made,
            "refused": list(refused),
        }

    def rows(studies: Iterable[Study]) -> Iterator[tuple[dict[str, Any], int]]:
        for study in studies:
            try:
                row = to_row(study, dtype)
            except Exception as error:
                if refuse is None:
                    raise
                refuse(study, error)
                continue
            shape = {view_name: list(view.kspace.shape) for view_name, view in study.views.items()}
            if shape not in subject_shapes:
                subject_shapes.append(shape)
            _count(shapes, subject_shapes.index(shape))
            undersampled.update(view_name for view_name, view in study.views.items() if view.sampled is not None)
            for label in LABELS:
                labels[label] += row[label] is not None
            yield row, payload_bytes(study, dtype)

    encoded = rows(studies)
    first = next(encoded, None)
    if first is None:
        shard = Shard(f"shards/{name}.parquet", split, 0, 0, 0, "")
        if not refused:
            return shard, summary()
        return _with_index(root, shard, schema(dtype).empty_table(), summary())
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
        groups=_runs(groups),
        shapes=_runs(shapes),
    )
    return _with_index(root, shard, index, summary())


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
    """What `write_shard` returned in an earlier run, or None.

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
            f"data.root: {storage.shown(root)} holds the unfinished dataset of another command (shards/{name}); choose "
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
                raise InputError(f"{shard.name}: expected a shard, got: {first_line(error)}; restore it") from None
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


def _count(runs: list[list[int]], value: int) -> None:
    """One more `value` at the end of run-length coded [count, value]."""
    if runs and runs[-1][1] == value:
        runs[-1][0] += 1
    else:
        runs.append([1, value])


def merged(runs: Iterable[Sequence[int]]) -> np.ndarray:
    """Runs [count, value] with equal neighbours made one, int64 ``run 2``."""
    found: list[list[int]] = []
    for count, value in runs:
        if found and found[-1][1] == value:
            found[-1][0] += count
        else:
            found.append([count, value])
    return np.array(found, np.int64).reshape(-1, 2)


def _runs(runs: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((int(a), int(b)) for a, b in runs)


def shard_of(fields: dict[str, Any]) -> Shard:
    """From JSON."""
    return Shard(**fields | {key: _runs(fields[key]) for key in ("groups", "shapes")})


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


def write_manifest(root: str, parts: Sequence[tuple[Shard, dict[str, Any]]], dtype: str, source: str) -> Manifest:
    """Collect finished shards into ``manifest.json``; the dataset exists from then on."""
    subject_shapes: list[dict[str, list[int]]] = []
    labels: dict[str, int] = {}
    shards = []
    for shard, summary in parts:
        for shape in summary["subject_shapes"]:
            if shape not in subject_shapes:
                subject_shapes.append(shape)
        number = [subject_shapes.index(shape) for shape in summary["subject_shapes"]]
        if shard.rows:
            shards.append(replace(shard, shapes=tuple((rows, number[i]) for rows, i in shard.shapes)))
        for label, count in summary["labels"].items():
            labels[label] = labels.get(label, 0) + count
    manifest = Manifest(
        dtype=dtype,
        shards=tuple(shards),
        subject_shapes=tuple(subject_shapes),
        labels=labels,
        undersampled=tuple(sorted({v for _, summary in parts for v in summary["undersampled"]})),
        source=source,
    )
    store, base = storage.open_root(root)
    content = json.dumps(asdict(manifest) | {"digest": manifest.digest}, separators=(",", ":"))
    storage.write_atomic(store, f"{base}/manifest.json", content.encode())
    return manifest


def present(root: str) -> bool:
    """Whether a finished dataset is there."""
    store, base = storage.open_root(root)
    return storage.exists(store, f"{base}/manifest.json")


def read_manifest(root: str) -> Manifest:
    """The manifest of a dataset; one of an earlier schema version is brought up to date in memory.

    Raises:
        InputError: no dataset there, or one that a newer version wrote.
    """
    store, base = storage.open_root(root)
    path = f"{base}/manifest.json"
    if not storage.exists(store, path):
        raise InputError(
            f"data.root: expected a dataset (manifest.json), got none in {root}; make one by simulate or ingest"
        )
    try:
        content = json.loads(storage.read_bytes(store, path))
        digest = content.pop("digest")
        version = content["schema_version"]
        if version not in range(1, SCHEMA_VERSION + 1):
            raise InputError(f"{path}: expected schema version 1 to {SCHEMA_VERSION}, got {version}; update kmtr")
        if version == 1:
            content = _from_version_1(root, content)
        content["schema_version"] = SCHEMA_VERSION  # what version 3 added is in the shards alone (`record.current`)
        manifest = Manifest(
            shards=tuple(shard_of(fields) for fields in content.pop("shards")),
            subject_shapes=tuple(content.pop("subject_shapes")),
            undersampled=tuple(content.pop("undersampled")),
            **content,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: expected a manifest, got invalid content ({type(error).__name__})") from None
    if manifest.digest != digest:
        raise InputError(f"{path}: its digest does not match its shards; write the dataset anew")
    return manifest


def _from_version_1(root: str, content: dict[str, Any]) -> dict[str, Any]:
    """A manifest of version 1 as one of today's: row groups and shapes are read from the shards."""
    subject_shapes: list[dict[str, list[int]]] = []
    shards = []
    store, base = storage.open_root(root)
    for fields in content["shards"]:
        try:
            with store.open_input_file(f"{base}/{fields['name']}") as source:
                file = pq.ParquetFile(source)
                columns = [f"shape_{view}" for view in VIEWS]
                rows = file.read(columns=columns, use_threads=False).to_pylist()
                groups = pages.group_rows(file.metadata)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{fields['name']}: expected a shard, got: {first_line(error)}; restore it") from None
        shapes: list[list[int]] = []
        for row in rows:
            shape = {view: row[f"shape_{view}"] for view in VIEWS if row[f"shape_{view}"] is not None}
            if shape not in subject_shapes:
                subject_shapes.append(shape)
            _count(shapes, subject_shapes.index(shape))
        shards.append(fields | {"groups": groups, "shapes": shapes})
    rest = {key: value for key, value in content.items() if key != "shapes"}
    return rest | {"shards": shards, "subject_shapes": subject_shapes}


def preflight(root: str, manifest: Manifest) -> None:
    """Find missing and truncated shards before a worker starts: size and footer of each file.

    Raises:
        InputError: names the shard, what was expected and what is there.
    """
    store, base = storage.open_root(root)
    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(lambda shard: _preflight(store, base, shard), manifest.shards):
            pass


def _preflight(store: Any, base: str, shard: Shard) -> None:
    info = store.get_file_info(f"{base}/{shard.name}")
    if info.size is None:
        raise InputError(f"{shard.name}: expected a shard of {shard.bytes} bytes, got no file; restore or rewrite it")
    if info.size != shard.bytes:
        raise InputError(
            f"{shard.name}: expected {shard.bytes} bytes, got {info.size}: truncated or changed; restore or rewrite it"
        )
    with store.open_input_file(f"{base}/{shard.name}") as file:
        file.seek(shard.bytes - 8)
        tail = file.read(8)
    footer = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or not 0 < footer < shard.bytes - 8:
        raise InputError(f"{shard.name}: expected a Parquet footer, got none; restore or rewrite it")


def first_line(error: BaseException) -> str:
    """What an error says, without the path that the system's own errors hold."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
