"""A dataset on disk: Parquet shards, one row per subject, and ``manifest.json``.

Payloads are `large_binary` columns, uncompressed, without dictionary or statistics: decoding is then a pointer, and a
view that is not read costs nothing. k-space is stored with real and imaginary part interleaved last (axes ``slice coil
t ky kx 2``); float16 comes with one scale per subject that puts the peak at 6e4, so that the round trip keeps an NMSE
under 1e-6 per line. Files are written under a temporary name and renamed, pages carry checksums.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kmtr.data import storage
from kmtr.types import DISEASES, PHENOTYPES, VIEWS, InputError, KmtrError, Study, View

SCHEMA_VERSION = 1
FP16_PEAK = 6e4
ROW_GROUP_BYTES = 1 << 20
"""Subjects smaller than this share a row group, since a row group is the unit of reading."""

SPLITS = {"train": 0.7, "val": 0.1, "test": 0.2}
MIN_SPLIT_SUBJECTS = 20
LABELS = (*PHENOTYPES, *DISEASES)


class DamagedShard(KmtrError):
    """A shard that is not what the manifest says. It would be so again: never retried."""


@dataclass(frozen=True)
class Shard:
    """One Parquet file: name relative to the dataset's root, and what it must be."""

    name: str
    split: str
    rows: int
    row_groups: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a dataset holds.

    Attributes:
        shards: in the order that numbers the rows of a split.
        shapes: view -> the different ``slice coil t ky kx`` shapes in it.
        labels: label -> number of subjects that have it.
        undersampled: views in which some source was undersampled.
        source: how the dataset was made.
    """

    dtype: str
    shards: tuple[Shard, ...]
    shapes: dict[str, list[list[int]]]
    labels: dict[str, int] = field(default_factory=dict)
    undersampled: tuple[str, ...] = ()
    source: str = ""
    schema_version: int = SCHEMA_VERSION

    def rows(self, split: str) -> int:
        return sum(s.rows for s in self.shards if s.split == split)

    @property
    def digest(self) -> str:
        """Identity of the data: SHA-256 over the shards' own."""
        return hashlib.sha256("".join(s.split + s.sha256 for s in self.shards).encode()).hexdigest()


def split_of(subject_id: str) -> str:
    """Split of a subject by a hash of its pseudonym: adding subjects moves nobody."""
    share = int.from_bytes(hashlib.blake2b(b"split" + subject_id.encode(), digest_size=8).digest(), "big") / 2**64
    if share < SPLITS["train"]:
        return "train"
    return "val" if share < SPLITS["train"] + SPLITS["val"] else "test"


# ---------------------------------------------------------------------------------------------------- Study <-> row


def schema(dtype: str) -> pa.Schema:
    fields = [pa.field("subject_id", pa.string(), nullable=False), pa.field("scale", pa.float64(), nullable=False)]
    for view in VIEWS:
        fields += [
            pa.field(f"kspace_{view}", pa.large_binary()),
            pa.field(f"shape_{view}", pa.list_(pa.int32())),
            pa.field(f"acquired_{view}", pa.binary()),
            pa.field(f"segmentation_{view}", pa.large_binary()),
            pa.field(f"spacing_mm_{view}", pa.list_(pa.float64())),
            pa.field(f"frame_time_s_{view}", pa.float64()),
        ]
    fields += [pa.field(name, pa.float64()) for name in LABELS]
    fields += [
        pa.field("vendor", pa.string()),
        pa.field("field_strength_t", pa.float64()),
        pa.field("source", pa.string()),
    ]
    return pa.schema(fields, metadata={"kmtr.schema_version": str(SCHEMA_VERSION), "kmtr.dtype": dtype})


def check_finite(study: Study) -> float:
    """Largest real or imaginary part in a study's k-space.

    Raises:
        InputError: k-space holds a value that is not finite, or nothing but zeros.
    """
    peak = float(np.max([np.abs(view.kspace.view(np.float32)).max() for view in study.views.values()]))  # keeps NaN
    if not math.isfinite(peak) or peak == 0:
        raise InputError(f"k-space: expected finite values that are not all zero, got a peak of {peak}")
    return peak


def to_row(study: Study, dtype: str) -> dict[str, Any]:
    """One Parquet row of a study.

    Raises:
        InputError: as `check_finite`.
    """
    peak = check_finite(study)
    scale = peak / FP16_PEAK if dtype == "float16" else 1.0
    row: dict[str, Any] = {
        "subject_id": study.subject_id,
        "scale": scale,
        "vendor": study.vendor,
        "field_strength_t": study.field_strength_t,
        "source": study.source,
    }
    for name in LABELS:
        value = study.labels.get(name)
        row[name] = None if value is None or math.isnan(value) else float(value)
    for name, view in study.views.items():
        interleaved = np.ascontiguousarray(view.kspace).view(np.float32).reshape(*view.kspace.shape, 2)
        stored = interleaved if dtype == "float32" else (interleaved / np.float32(scale)).astype(np.float16)
        row[f"kspace_{name}"] = stored.tobytes()
        row[f"shape_{name}"] = list(view.kspace.shape)
        row[f"acquired_{name}"] = None if view.sampled is None else np.packbits(view.sampled).tobytes()
        row[f"segmentation_{name}"] = None if view.segmentation is None else view.segmentation.tobytes()
        row[f"spacing_mm_{name}"] = None if view.spacing_mm is None else list(view.spacing_mm)
        row[f"frame_time_s_{name}"] = view.frame_time_s
    return row


def to_study(table: pa.Table, row: int = 0) -> Study:
    """The study of one row, views that were not read left out. Inverse of `to_row` up to the storage precision."""
    views = {}
    for name in VIEWS:
        raw = raw_kspace(table, row, name)
        if raw is None:
            continue
        stored, scale = raw
        kspace = np.ascontiguousarray(stored.astype(np.float32) * np.float32(scale)).view(np.complex64)[..., 0]
        slices, _, frames, ny, nx = kspace.shape
        packed = _value(table, f"acquired_{name}", row)
        segmentation = _value(table, f"segmentation_{name}", row)
        spacing = _value(table, f"spacing_mm_{name}", row)
        views[name] = View(
            kspace=kspace,
            sampled=None if packed is None else unpack(packed, (slices, frames, ny)),
            segmentation=None
            if segmentation is None
            else np.frombuffer(segmentation, np.uint8).reshape(slices, frames, ny, nx),
            spacing_mm=None if spacing is None else (spacing[0], spacing[1], spacing[2]),
            frame_time_s=_value(table, f"frame_time_s_{name}", row),
        )
    labels = {n: v for n in LABELS if n in table.column_names and (v := _value(table, n, row)) is not None}
    return Study(
        subject_id=_value(table, "subject_id", row),
        views=views,
        labels=labels,
        source=_value(table, "source", row) or "",
        vendor=_value(table, "vendor", row),
        field_strength_t=_value(table, "field_strength_t", row),
    )


def raw_kspace(table: pa.Table, row: int, view: str) -> tuple[np.ndarray, float] | None:
    """Stored values of one view without a copy, and their scale; None where the subject lacks the view.

    Returns:
        float16 or float32 ``slice coil t ky kx 2``, read-only, in Arrow's memory; k-space = values * scale.
    """
    column = f"kspace_{view}"
    if column not in table.column_names:
        return None
    array = table.column(column).slice(row, 1).chunk(0)
    if array.null_count:
        return None
    shape = table.column(f"shape_{view}")[row].as_py()
    dtype = table.schema.metadata[b"kmtr.dtype"].decode()
    # Through the buffers, since taking an element of a binary column copies it.
    _, offsets, memory = array.buffers()
    first, last = np.frombuffer(offsets, np.int64)[array.offset : array.offset + 2].tolist()
    stored = np.frombuffer(memory.slice(first, last - first), dtype).reshape(*shape, 2)
    stored.flags.writeable = False  # Arrow's memory is shared with whoever else holds the table
    return stored, table.column("scale")[row].as_py()


def unpack(packed: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """bool ``slice t ky`` from its stored bits."""
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=math.prod(shape)).astype(bool).reshape(shape)


def _value(table: pa.Table, column: str, row: int) -> Any:
    return table.column(column)[row].as_py() if column in table.column_names else None


# ------------------------------------------------------------------------------------------------------------- files


def write_shard(root: str, name: str, split: str, studies: Iterable[Study], dtype: str) -> tuple[Shard, dict[str, Any]]:
    """Write one shard, whole or not at all, and beside it what the manifest needs (``<name>.json``: makes a rerun skip
    it).

    Returns:
        The shard (0 rows: no file was written) and a summary: shapes, labels, undersampled views.
    """
    store, base = storage.open_root(root)
    store.create_dir(f"{base}/shards", recursive=True)
    sink = io.BytesIO()
    shapes: dict[str, set[tuple[int, ...]]] = {}
    labels: dict[str, int] = {}
    undersampled: set[str] = set()
    writer: pq.ParquetWriter | None = None
    rows = groups = per_group = 0
    pending: list[dict[str, Any]] = []
    for study in studies:
        row = to_row(study, dtype)
        pending.append(row)
        rows += 1
        for view_name, view in study.views.items():
            shapes.setdefault(view_name, set()).add(view.kspace.shape)
            if view.sampled is not None:
                undersampled.add(view_name)
        for label in LABELS:
            labels[label] = labels.get(label, 0) + (row[label] is not None)
        if writer is None:
            payload = sum(len(row[f"kspace_{v}"]) for v in study.views)
            per_group = max(1, ROW_GROUP_BYTES // payload)
            writer = _writer(sink, dtype)
        if len(pending) == per_group:
            writer.write_table(pa.Table.from_pylist(pending, schema=schema(dtype)))
            groups += 1
            pending.clear()
    if writer is None:
        return Shard(name, split, 0, 0, 0, ""), {"shapes": {}, "labels": {}, "undersampled": []}
    if pending:
        writer.write_table(pa.Table.from_pylist(pending, schema=schema(dtype)))
        groups += 1
    writer.close()
    content = sink.getvalue()
    path = f"shards/{name}.parquet"
    storage.write_atomic(store, f"{base}/{path}", content)
    shard = Shard(path, split, rows, groups, len(content), hashlib.sha256(content).hexdigest())
    summary = {
        "shapes": {v: sorted(map(list, s)) for v, s in shapes.items()},
        "labels": {k: n for k, n in labels.items() if n},
        "undersampled": sorted(undersampled),
    }
    storage.write_atomic(store, f"{base}/shards/{name}.json", json.dumps({"shard": asdict(shard)} | summary).encode())
    return shard, summary


def finished_shard(root: str, name: str) -> tuple[Shard, dict[str, Any]] | None:
    """What `write_shard` returned in an earlier run, or None."""
    store, base = storage.open_root(root)
    path = f"{base}/shards/{name}.json"
    if not storage.exists(store, path):
        return None
    summary = json.loads(storage.read_bytes(store, path))
    shard = Shard(**summary.pop("shard"))
    return (shard, summary) if storage.exists(store, f"{base}/{shard.name}") else None


def _writer(sink: Any, dtype: str) -> pq.ParquetWriter:
    compression = {f.name: "NONE" for f in schema(dtype)} | {f"segmentation_{v}": "LZ4" for v in VIEWS}
    return pq.ParquetWriter(
        sink,
        schema(dtype),
        compression=compression,
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )


def write_manifest(root: str, parts: Sequence[tuple[Shard, dict[str, Any]]], dtype: str, source: str) -> Manifest:
    """Collect finished shards into ``manifest.json``; the dataset exists from then on."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    labels: dict[str, int] = {}
    for _, summary in parts:
        for view, seen in summary["shapes"].items():
            shapes.setdefault(view, set()).update(map(tuple, seen))
        for label, count in summary["labels"].items():
            labels[label] = labels.get(label, 0) + count
    manifest = Manifest(
        dtype=dtype,
        shards=tuple(shard for shard, _ in parts if shard.rows),
        shapes={v: sorted(map(list, s)) for v, s in shapes.items()},
        labels=labels,
        undersampled=tuple(sorted({v for _, summary in parts for v in summary["undersampled"]})),
        source=source,
    )
    store, base = storage.open_root(root)
    content = json.dumps(asdict(manifest) | {"digest": manifest.digest}, indent=1)
    storage.write_atomic(store, f"{base}/manifest.json", content.encode())
    return manifest


def present(root: str) -> bool:
    """Whether a finished dataset is there."""
    store, base = storage.open_root(root)
    return storage.exists(store, f"{base}/manifest.json")


def read_manifest(root: str) -> Manifest:
    """The manifest of a dataset.

    Raises:
        InputError: no dataset there, or one of another schema version.
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
        if version != SCHEMA_VERSION:
            raise InputError(f"{path}: expected schema version {SCHEMA_VERSION}, got {version}")
        shards = tuple(Shard(**s) for s in content.pop("shards"))
        manifest = Manifest(shards=shards, undersampled=tuple(content.pop("undersampled")), **content)
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: expected a manifest, got invalid content ({type(error).__name__})") from None
    if manifest.digest != digest:
        raise InputError(f"{path}: its digest does not match its shards; write the dataset anew")
    return manifest


def preflight(root: str, manifest: Manifest) -> None:
    """Find missing and truncated shards before a worker starts: size and footer of each file.

    Raises:
        DamagedShard (status 2 through InputError): names the shard, what was expected and what is there.
    """
    store, base = storage.open_root(root)
    for info, shard in zip(
        store.get_file_info([f"{base}/{s.name}" for s in manifest.shards]), manifest.shards, strict=True
    ):
        if info.size is None:
            raise InputError(
                f"{shard.name}: expected a shard of {shard.bytes} bytes, got no file; restore or rewrite it"
            )
        if info.size != shard.bytes:
            raise InputError(
                f"{shard.name}: expected {shard.bytes} bytes, got {info.size}: truncated or changed; "
                "restore or rewrite it"
            )
        with store.open_input_file(f"{base}/{shard.name}") as file:
            try:
                groups = pq.ParquetFile(file).metadata.num_row_groups
            except (pa.ArrowInvalid, OSError):
                groups = -1
        if groups != shard.row_groups:
            raise InputError(f"{shard.name}: expected a Parquet footer with {shard.row_groups} row groups; damaged")


class Reader:
    """Rows of one split by their number; keeps the footers of opened shards.

    Args:
        columns: read no others; a missing column is an error of the caller.
    """

    def __init__(self, root: str, manifest: Manifest, split: str, columns: Sequence[str] | None, verify: bool = True):
        self.root, self.split, self.columns, self.verify = root, split, columns, verify
        self.shards = [s for s in manifest.shards if s.split == split]
        self.first = np.cumsum([0, *(s.rows for s in self.shards)])
        self._files: dict[int, pq.ParquetFile] = {}

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def bytes_per_row(self) -> int:
        """On disk, all columns."""
        return sum(s.bytes for s in self.shards) // max(len(self), 1)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def read(self, rows: Sequence[int] | np.ndarray) -> pa.Table:
        """The rows in the order given; payloads are slices of what was read, not copies.

        Raises:
            DamagedShard: a file is missing, truncated, or a page does not match its checksum.
        """
        return pa.concat_tables([self._row(int(row)) for row in rows])

    def _row(self, row: int) -> pa.Table:
        index = int(np.searchsorted(self.first, row, side="right")) - 1
        shard = self.shards[index]
        try:
            file = self._open(index)
            offset = row - int(self.first[index])
            for group in range(file.metadata.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if offset < count:
                    table = file.read_row_group(group, columns=self.columns, use_threads=False)
                    return table.slice(offset, 1)
                offset -= count
        except (pa.ArrowException, OSError) as error:
            self._files.pop(index, None)
            reason = str(error).splitlines()[0]
            raise DamagedShard(f"{shard.name}: expected readable pages, got: {reason}; restore or rewrite it") from None
        raise DamagedShard(f"{shard.name}: expected {shard.rows} rows, got fewer; restore or rewrite it")

    def _open(self, index: int) -> pq.ParquetFile:
        if index not in self._files:
            store, base = storage.open_root(self.root)
            source = store.open_input_file(f"{base}/{self.shards[index].name}")
            self._files[index] = pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=self.verify)
        return self._files[index]


def columns_of(views: Sequence[str], labels: Sequence[str] = (), segmentation: bool = False) -> list[str]:
    """Columns that training on these views needs."""
    kinds = ["kspace", "shape", "acquired", *(["segmentation"] if segmentation else [])]
    return ["subject_id", "scale", *(f"{kind}_{view}" for view in views for kind in kinds), *labels]
