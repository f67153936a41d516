"""Rows of a split by their number, from one or several datasets: small columns from the indexes, payloads in place."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kmtr.config import Data
from kmtr.data.dataset import pages, record, shards, storage
from kmtr.data.dataset.cache import Cache, open_file
from kmtr.data.dataset.manifest import DamagedShard, Manifest, Shard, digest_of, preflight, read_manifest
from kmtr.types import VIEWS, InputError

OPEN_SHARDS = 256
"""Shards whose index and file a reader keeps open."""

READS_IN_FLIGHT = 16
"""Reads at once for a batch from an object store, where each waits for the network; one thread copies local files."""

KEPT_ROW_GROUPS = 64
"""Row groups of several subjects (of `shards.ROW_GROUP_BYTES` at most) that are kept of each open shard."""


@dataclass(frozen=True)
class Dataset:
    """One or several datasets that are trained on together, in the order of ``data.root, *data.more``."""

    roots: tuple[str, ...]
    manifests: tuple[Manifest, ...]

    @staticmethod
    def open(data: Data) -> Dataset:
        """The datasets of a configuration.

        Raises:
            InputError: one is missing or damaged, or they store k-space in different types.
        """
        return Dataset.of(*data.roots)

    @staticmethod
    def of(*roots: str) -> Dataset:
        """As `open`, by their paths or URIs."""
        manifests = tuple(read_manifest(root) for root in roots)
        if len({m.dtype for m in manifests}) > 1:
            raise InputError(
                f"data.more: expected datasets of one dtype, got {', '.join(m.dtype for m in manifests)}; "
                "write them anew with the same shards.dtype"
            )
        return Dataset(roots, manifests)

    @property
    def digest(self) -> str:
        """Identity of the data."""
        if len(self.manifests) == 1:
            return self.manifests[0].digest
        return digest_of(m.digest for m in self.manifests)

    @property
    def source(self) -> str:
        """How the data was made."""
        return "; ".join(manifest.source for manifest in self.manifests)

    @property
    def slice_order(self) -> str:
        """Which end of the short axis comes first, in words."""
        simulated = {manifest.simulated for manifest in self.manifests}
        others = "from base to apex where the source tells the slices' positions, else as stored"
        if simulated == {True}:
            return "from apex to base"
        return others if simulated == {False} else f"from apex to base in simulated hearts, in others {others}"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.manifests[0].dtype)

    @property
    def shapes(self) -> dict[str, list[list[int]]]:
        """View -> the different ``slice coil t ky kx`` shapes in it."""
        views: dict[str, list[list[int]]] = {}
        for manifest in self.manifests:
            for view, some in manifest.shapes.items():
                views.setdefault(view, []).extend(s for s in some if s not in views.get(view, []))
        return views

    @property
    def undersampled(self) -> set[str]:
        """Views in which some source was undersampled."""
        return {view for manifest in self.manifests for view in manifest.undersampled}

    @property
    def labels(self) -> dict[str, int]:
        """Label -> number of subjects that have it."""
        counts: dict[str, int] = {}
        for manifest in self.manifests:
            for label, count in manifest.labels.items():
                counts[label] = counts.get(label, 0) + count
        return counts

    def rows(self, split: str) -> int:
        return sum(manifest.rows(split) for manifest in self.manifests)

    def __reduce__(self) -> Any:
        """Travels as its paths: the manifests of millions of subjects are read where they are needed."""
        return _reopen, (self.roots, self.digest)

    def preflight(self) -> None:
        """As `manifest.preflight`, of all."""
        for root, manifest in zip(self.roots, self.manifests, strict=True):
            preflight(root, manifest)

    def reader(self, split: str, data: Data, columns: Sequence[str] | None = None) -> Reader:
        return Reader(self, split, columns, data.verify_pages, data.cache, data.cache_gib)


def _reopen(roots: tuple[str, ...], digest: str) -> Dataset:
    dataset = Dataset.of(*roots)
    if dataset.digest != digest:
        raise DamagedShard(f"{roots[0]}/manifest.json: expected the dataset that training began with, got another")
    return dataset


class Reader:
    """Rows of one split by their number, the first dataset's first.

    Args:
        columns: of `read`; None reads all.
        verify: ``always`` checks each page read against its checksum, ``once`` each page's first read by this process.
        cache, cache_gib: local folder that keeps shards of an object store, and its bound.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        columns: Sequence[str] | None = None,
        verify: str = "always",
        cache: str = "",
        cache_gib: float = 64.0,
    ):
        self.dataset, self.split, self.columns, self.verify = dataset, split, columns, verify
        self.cache, self.cache_gib = cache, cache_gib
        self.shards: list[tuple[str, Shard]] = [
            (root, shard)
            for root, manifest in zip(dataset.roots, dataset.manifests, strict=True)
            for shard in manifest.shards
            if shard.split == split
        ]
        self.first = np.cumsum([0, *(shard.rows for _, shard in self.shards)])
        self._forget()

    def _forget(self) -> None:
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._forget()

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def dtype(self) -> np.dtype:
        return self.dataset.dtype

    @property
    def bytes_per_row(self) -> int:
        """On disk, all columns."""
        return sum(shard.bytes for _, shard in self.shards) // max(len(self), 1)

    def read(self, rows: Sequence[int] | np.ndarray) -> pa.Table:
        """The rows in the order given, as a table of `columns`; by pyarrow.

        Raises:
            DamagedShard: a file is missing, truncated, or a page does not match its checksum.
        """
        return pa.concat_tables([shard.row(place, self.columns) for shard, place in map(self._shard, map(int, rows))])

    def samples(self, rows: Sequence[int] | np.ndarray) -> RowSamples:
        """The rows in the order given, for `loader.collate`: payloads are read when they are fetched.

        Raises:
            DamagedShard: as `read`.
        """
        return RowSamples(self, [int(row) for row in rows])

    def pseudonym(self, row: int) -> str | None:
        """Pseudonym of a row by the index beside its shard, which may be there when the shard is not; else None."""
        number = self._number(row)
        index = shards.stored_index(*self.shards[number])
        return None if index is None else str(index.column("subject_id")[row - int(self.first[number])].as_py())

    def _number(self, row: int) -> int:
        """Number of the shard that holds a row."""
        return int(np.searchsorted(self.first, row, side="right")) - 1

    def _shard(self, row: int) -> tuple[_OpenShard, int]:
        """The open shard of a row, and the row's place in it."""
        number = self._number(row)
        with self._lock:
            shard = self._open.get(number)
            if shard is None:
                shard = self._open[number] = _OpenShard(self, *self.shards[number])
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)  # its file closes when the last thread lets go of it
            else:
                self._open.move_to_end(number)
        return shard, row - int(self.first[number])


class RowSamples:
    """Samples of a reader."""

    def __init__(self, reader: Reader, rows: Sequence[int]):
        self.reader, self.dtype = reader, reader.dtype
        self.in_flight = READS_IN_FLIGHT if any("://" in root for root in reader.dataset.roots) else 1
        self.places = [reader._shard(row) for row in rows]

    @cached_property
    def meta(self) -> pa.Table:
        return pa.concat_tables([shard.index.slice(row, 1) for shard, row in self.places], promote_options="default")

    def fetch(self, row: int, view: str, shape: Sequence[int], out: np.ndarray | None = None) -> np.ndarray | None:
        shard, place = self.places[row]
        return shard.fetch(place, view, shape, out)

    def fetch_masks(self, row: int, view: str, shape: Sequence[int]) -> np.ndarray | None:
        shard, place = self.places[row]
        return shard.decoded(place, f"segmentation_{view}", np.dtype(np.uint8), (shape[0], *shape[2:]))


class _OpenShard:
    """One shard: its file, its index, and the few row groups of several subjects that are being read."""

    def __init__(self, reader: Reader, root: str, shard: Shard):
        self.root, self.shard, self.verify, self.dtype = root, shard, reader.verify, reader.dtype
        self.name = shard.name
        self._seen: set[int] = set()
        self._lock = Lock()
        self._parquet: pq.ParquetFile | None = None
        self._groups: OrderedDict[tuple[int, str], pa.Table] = OrderedDict()
        cache = Cache(reader.cache, reader.cache_gib) if reader.cache else None
        try:
            self.file = open_file(root, shard.name, cache, shard.bytes, shard.sha256)
        except (pa.ArrowException, OSError, EOFError) as error:
            raise self.damaged(storage.reason(error)) from None
        self.index = self._index()
        self.places = {view: pages.places_of(self.index, f"kspace_{view}") for view in VIEWS}
        sizes = np.repeat(*np.array(shard.groups, np.int64).reshape(-1, 2).T[::-1])
        self.group_first = np.cumsum([0, *sizes])

    def damaged(self, reason: str, row: int | None = None) -> DamagedShard:
        where = self.name
        if row is not None:
            where += f", row group {self.group(row)}"
        return DamagedShard(f"{where}: expected readable pages, got: {reason}; restore or rewrite it")

    def group(self, row: int) -> int:
        return int(np.searchsorted(self.group_first, row, side="right")) - 1

    def _index(self) -> pa.Table:
        """The index beside the shard, or one made from the shard where there is none that fits."""
        index = shards.stored_index(self.root, self.shard)
        if index is None:
            index = self._with_pyarrow(shards.index_of)
            if wrong := record.check_version(index.schema.metadata):
                raise self.damaged(wrong)
        return record.current(index)

    def _with_pyarrow(self, read: Callable[[pq.ParquetFile], pa.Table], row: int | None = None) -> pa.Table:
        """Result of `read` on the Parquet file, by one thread at a time."""
        try:
            if self._parquet is None:
                self._parquet = pq.ParquetFile(
                    self.file.native(), pre_buffer=False, page_checksum_verification=self.verify != "never"
                )
            return read(self._parquet)
        except (pa.ArrowException, OSError) as error:
            raise self.damaged(storage.reason(error), row) from None

    def row(self, row: int, columns: Sequence[str] | None) -> pa.Table:
        group = self.group(row)
        wanted = None if columns is None else list(columns)
        with self._lock:
            table = self._with_pyarrow(lambda file: file.read_row_group(group, columns=wanted, use_threads=False), row)
        return record.current(table.slice(row - int(self.group_first[group]), 1), wanted)

    def fetch(self, row: int, view: str, shape: Sequence[int], out: np.ndarray | None) -> np.ndarray | None:
        start, size = self.places[view][row].tolist()
        if start < 0:
            return self.decoded(row, f"kspace_{view}", self.dtype, (*shape, 2), out)
        if out is None:
            out = np.empty((*shape, 2), self.dtype)
        payload = out.reshape(-1).view(np.uint8).data
        if not len(payload) < size <= len(payload) + pages.MAX_HEAD:
            raise self.damaged(f"a page of {size} bytes for {len(payload)} bytes of {view}", row)
        head = bytearray(size - len(payload))
        try:
            self.file.read_into(start, head, payload)
            known = start in self._seen
            pages.check(bytes(head), payload, self.verify == "always" or (self.verify == "once" and not known))
        except (pages.BadPage, EOFError, OSError) as error:
            raise self.damaged(storage.reason(error), row) from None
        self._seen.add(start)
        return out

    def decoded(
        self, row: int, column: str, dtype: np.dtype, shape: Sequence[int], out: np.ndarray | None = None
    ) -> np.ndarray | None:
        """A payload by pyarrow: masks, and k-space in row groups of several subjects or compressed."""
        group = self.group(row)
        with self._lock:
            table = self._groups.get((group, column))
            if table is None:
                table = self._with_pyarrow(
                    lambda file: file.read_row_group(group, columns=[column], use_threads=False), row
                )
                if len(table) > 1:
                    self._groups[group, column] = table
                if len(self._groups) > KEPT_ROW_GROUPS:
                    self._groups.popitem(last=False)
            else:
                self._groups.move_to_end((group, column))
        payload = pages.payload_of(table.column(column), row - int(self.group_first[group]))
        if payload is None:
            return None
        if len(payload) != math.prod(shape) * dtype.itemsize:
            raise self.damaged(f"{len(payload)} bytes of {column} for a shape of {'x'.join(map(str, shape))}", row)
        values = np.frombuffer(payload, dtype).reshape(shape)
        if out is not None:
            np.copyto(out, values)
            return out
        values.flags.writeable = False
        return values
