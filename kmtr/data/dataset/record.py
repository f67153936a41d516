"""One subject as one row of a shard's table: the schema, Study -> row, row -> Study.

k-space is stored with real and imaginary part interleaved last (axes ``slice coil t ky kx 2``); float16 comes with one
scale per subject that puts the peak at 6e4, so that the round trip keeps an NMSE under 1e-6 per line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from kmtr.data.dataset import SCHEMA_VERSION, pages
from kmtr.data.sources.payload import check_payload
from kmtr.types import LABELS, VIEWS, InputError, Study, View

FP16_PEAK = 6e4


def schema(dtype: str) -> pa.Schema:
    fields = [pa.field("subject_id", pa.string(), nullable=False), pa.field("scale", pa.float64(), nullable=False)]
    for view in VIEWS:
        fields += [
            pa.field(f"kspace_{view}", pa.large_binary()),
            pa.field(f"shape_{view}", pa.list_(pa.int32())),
            pa.field(f"acquired_{view}", pa.binary()),
            pa.field(f"segmentation_{view}", pa.large_binary()),
            pa.field(f"contoured_{view}", pa.list_(pa.uint8())),
            pa.field(f"spacing_mm_{view}", pa.list_(pa.float64())),
            pa.field(f"frame_time_s_{view}", pa.float64()),
            pa.field(f"affine_{view}", pa.list_(pa.float64())),
        ]
    fields += [pa.field(name, pa.float64()) for name in LABELS]
    fields += [
        pa.field("vendor", pa.string()),
        pa.field("field_strength_t", pa.float64()),
        pa.field("source", pa.string()),
    ]
    return pa.schema(fields, metadata={"kmtr.schema_version": str(SCHEMA_VERSION), "kmtr.dtype": dtype})


def added(column: str) -> int:
    """Version of the schema from which on a column must be there."""
    return 4 if column.startswith("affine_") else 3 if column.startswith("contoured_") or column in LABELS else 1


def current(table: pa.Table, columns: Sequence[str] | None = None) -> pa.Table:
    """A table of an earlier schema version with the columns that this one added, empty.

    Args:
        columns: those that were asked for; None: all.
    """
    metadata = table.schema.metadata or {}
    version = int(metadata.get(b"kmtr.schema_version", b"0"))
    if version == SCHEMA_VERSION:
        return table
    wanted = schema(metadata.get(b"kmtr.dtype", b"").decode())
    for column in wanted:
        lacks = added(column.name) > version and column.name not in table.column_names
        if lacks and (columns is None or column.name in columns):
            table = table.append_column(column, pa.nulls(len(table), column.type))
    ours = [name for name in wanted.names if name in table.column_names]
    table = table.select([*ours, *(name for name in table.column_names if name not in ours)])
    return table.replace_schema_metadata(metadata | {b"kmtr.schema_version": str(SCHEMA_VERSION).encode()})


def check_version(metadata: dict[bytes, bytes] | None) -> str:
    """Error in the schema version that a file's metadata tells; empty: none."""
    version = (metadata or {}).get(b"kmtr.schema_version", b"none").decode()
    return "" if version in map(str, range(1, SCHEMA_VERSION + 1)) else f"schema version {version}"


def check_finite(study: Study) -> float:
    """Largest real or imaginary part in a study's k-space.

    Raises:
        InputError: k-space holds a value that is not finite, or nothing but zeros; a label is infinite.
    """
    for name, value in study.labels.items():
        if math.isinf(value):
            raise InputError(f"{name}: expected a finite number, or none where it is unknown, got {value}")
    peak = float(np.max([np.abs(view.kspace.view(np.float32)).max() for view in study.views.values()]))  # keeps NaN
    if not math.isfinite(peak) or peak == 0:
        raise InputError(f"k-space: expected finite values that are not all zero, got a peak of {peak}")
    return peak


def to_row(study: Study, dtype: str) -> dict[str, Any]:
    """One Parquet row of a study.

    Raises:
        InputError: as `check_payload` and `check_finite`.
    """
    for name, view in study.views.items():
        check_payload(name, view.kspace.shape, dtype)
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
        row[f"contoured_{name}"] = None if view.contoured is None else list(view.contoured)
        row[f"spacing_mm_{name}"] = None if view.spacing_mm is None else list(view.spacing_mm)
        row[f"frame_time_s_{name}"] = view.frame_time_s
        row[f"affine_{name}"] = None if view.affine is None else view.affine[:3].ravel().tolist()
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
        slices, _, frames, ny, _ = kspace.shape
        packed = _value(table, f"acquired_{name}", row)
        spacing = _value(table, f"spacing_mm_{name}", row)
        contoured = _value(table, f"contoured_{name}", row)
        affine = _value(table, f"affine_{name}", row)
        views[name] = View(
            kspace=kspace,
            sampled=None if packed is None else unpack(packed, (slices, frames, ny)),
            segmentation=raw_masks(table, row, name),
            spacing_mm=None if spacing is None else (spacing[0], spacing[1], spacing[2]),
            frame_time_s=_value(table, f"frame_time_s_{name}", row),
            contoured=None if contoured is None else tuple(contoured),
            affine=None if affine is None else affine_of(affine),
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
    if f"kspace_{view}" not in table.column_names:
        return None
    payload = pages.payload_of(table.column(f"kspace_{view}"), row)
    if payload is None:
        return None
    shape = table.column(f"shape_{view}")[row].as_py()
    stored = np.frombuffer(payload, stored_dtype(table.schema)).reshape(*shape, 2)
    stored.flags.writeable = False  # Arrow's memory is shared with whoever else holds the table
    return stored, table.column("scale")[row].as_py()


def raw_masks(table: pa.Table, row: int, view: str) -> np.ndarray | None:
    """Masks of one view without a copy, uint8 ``slice t y x``, read-only; None where it has none."""
    name = f"segmentation_{view}"
    payload = pages.payload_of(table.column(name), row) if name in table.column_names else None
    if payload is None:
        return None
    slices, _, frames, ny, nx = table.column(f"shape_{view}")[row].as_py()
    return np.frombuffer(payload, np.uint8).reshape(slices, frames, ny, nx)


def stored_dtype(schema: pa.Schema) -> np.dtype:
    """Type of k-space in a table or shard."""
    return np.dtype(schema.metadata[b"kmtr.dtype"].decode())


def unpack(packed: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """bool ``slice t ky`` from its stored bits."""
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=math.prod(shape)).astype(bool).reshape(shape)


def affine_of(stored: Sequence[float]) -> np.ndarray:
    """4x4 from its stored first three rows."""
    return np.vstack([np.reshape(stored, (3, 4)), (0.0, 0.0, 0.0, 1.0)])


def _value(table: pa.Table, column: str, row: int) -> Any:
    return table.column(column)[row].as_py() if column in table.column_names else None


def columns_of(views: Sequence[str], labels: Sequence[str] = (), segmentation: bool = False) -> list[str]:
    """Columns that training on these views needs; with `segmentation` also those that say what masks mean."""
    kinds = ["kspace", "shape", "acquired", *(["segmentation", "contoured", "spacing_mm"] if segmentation else [])]
    return ["subject_id", "scale", *(f"{kind}_{view}" for view in views for kind in kinds), *labels]


class Loaded:
    """Samples (`loader.collate`) out of a whole table."""

    def __init__(self, table: pa.Table):
        self.meta, self.dtype, self.in_flight = table, stored_dtype(table.schema), 1

    def fetch(self, row: int, view: str, shape: Sequence[int], out: np.ndarray | None = None) -> np.ndarray | None:
        found = raw_kspace(self.meta, row, view)
        if found is None:
            return None
        if out is not None:
            np.copyto(out, found[0])
            return out
        return found[0]

    def fetch_masks(self, row: int, view: str, shape: Sequence[int]) -> np.ndarray | None:
        return raw_masks(self.meta, row, view)
