"""The manifest of a dataset: which shards it holds, and what each of them must be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from kmtr.data.dataset import SCHEMA_VERSION, pages, storage
from kmtr.types import VIEWS, InputError, KmtrError, with_kind


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
    """Contents of a dataset.

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
    def simulated(self) -> bool:
        return self.source.startswith("simulate")

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


def shard_of(fields: dict[str, Any]) -> Shard:
    """From JSON."""
    return Shard(**fields | {key: runs_of(fields[key]) for key in ("groups", "shapes")})


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


def has_dataset(root: str) -> bool:
    """True if a finished dataset is there."""
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
        content["schema_version"] = (
            SCHEMA_VERSION  # what versions 3 and 4 added is in the shards alone (`record.current`)
        )
        if unknown := sorted(content.keys() - Manifest.__dataclass_fields__.keys()):
            raise ValueError(f"unknown {unknown[0]}")
        manifest = _MANIFEST.validate_python(content)
        _check(manifest)
    except InputError:
        raise
    except pydantic.ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, wrong["loc"]))
        raise InputError(f"{path}: expected a manifest, got for {where}: {wrong['msg']}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: expected a manifest, got invalid content: {with_kind(error)}") from None
    if manifest.digest != digest:
        raise InputError(f"{path}: its digest does not match its shards; write the dataset anew")
    return manifest


_MANIFEST = pydantic.TypeAdapter(Manifest)


def _check(manifest: Manifest) -> None:
    """Check the numbers and names that the types leave open.

    Raises:
        ValueError: the first thing that is wrong.
    """
    if manifest.dtype not in ("float16", "float32"):
        raise ValueError(f"dtype: expected float16 or float32, got {manifest.dtype}")
    for shape in manifest.subject_shapes:
        for view, axes in shape.items():
            if view not in VIEWS or len(axes) != 5 or min(axes) < 1:
                raise ValueError(f"subject_shapes: expected slice, coil, t, ky, kx of a view, got {view}: {axes}")
    for shard in manifest.shards:
        _check_name(shard.name)
        runs = (*shard.groups, *shard.shapes)
        counts = [shard.rows, shard.row_groups, shard.bytes, *(number for run in runs for number in run)]
        rows = {sum(n * size for n, size in shard.groups), sum(n for n, _ in shard.shapes), shard.rows}
        kinds = max((number for _, number in shard.shapes), default=-1)
        if min(counts) < 0 or shard.bytes < 12 or len(rows) > 1 or kinds >= len(manifest.subject_shapes):
            raise ValueError(f"shards: the numbers of {shard.name} do not agree")


def _check_name(name: str) -> None:
    """Raises ValueError: a name of a shard that leaves the dataset."""
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts or not name.isprintable():
        raise ValueError(f"shards: expected a name within the dataset, got {name!r}")


def _from_version_1(root: str, content: dict[str, Any]) -> dict[str, Any]:
    """A manifest of version 1 as one of today's: row groups and shapes are read from the shards."""
    subject_shapes: list[dict[str, list[int]]] = []
    shards = []
    store, base = storage.open_root(root)
    for fields in content["shards"]:
        _check_name(fields["name"])
        try:
            with store.open_input_file(f"{base}/{fields['name']}") as source:
                file = pq.ParquetFile(source)
                columns = [f"shape_{view}" for view in VIEWS]
                rows = file.read(columns=columns, use_threads=False).to_pylist()
                groups = pages.group_rows(file.metadata)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{fields['name']}: expected a shard, got: {storage.reason(error)}; restore it") from None
        shapes: list[list[int]] = []
        for row in rows:
            shape = {view: row[f"shape_{view}"] for view in VIEWS if row[f"shape_{view}"] is not None}
            if shape not in subject_shapes:
                subject_shapes.append(shape)
            count_run(shapes, subject_shapes.index(shape))
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


# -------------------------------------------------------------------------------------------------------------- runs


def count_run(runs: list[list[int]], value: int) -> None:
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


def runs_of(runs: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((int(a), int(b)) for a, b in runs)
