"""python kmtr/bench/peers.py REQUEST      other loaders on the bytes of bench.py data (REQUEST: JSON; answers in JSON)

Runs in the environment of the peers (`make bench`), so it imports nothing of ours; data.py takes its clock from
here, so that ours and theirs are measured by the same lines. The job is the same for all: rows in shuffled order,
every row once an epoch, batches of rows stacked into ONE torch tensor of the stored values. Each peer gets the settings
that are fastest for it (see each function); the number of its workers is tried on the machine.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

BATCH = 4
"""Rows of one batch."""

FILE_BYTES = 1 << 28
FILES = 8
"""Files of many rows hold `FILE_BYTES`, less where those were fewer than `FILES`: workers share a dataset by files."""

BUFFER = 16
"""Rows of a shuffle buffer, for peers that read in the order of the file."""

SEED = 0
FOREVER = 1 << 30
Batches = Generator[Tensor, None, None]


# ------------------------------------------------------------------------------------------------------------ clock


@dataclass(frozen=True)
class Speed:
    """One measurement.

    Attributes:
        first_batch_s: from opening the dataset to its first batch.
        gb_s: stored bytes (1e9) a second from the first batch on, that one excluded.
        gap_s: longest wait for a batch, the first excluded.
        border_gap_s: longest wait for an epoch's first batch, the first epoch's excluded.
        batches: that were read.
        fingerprint: sum of `fingerprint` over them, modulo 2^64.
    """

    first_batch_s: float
    gb_s: float
    gap_s: float
    border_gap_s: float
    batches: int
    fingerprint: int


def measure(
    start: Callable[[], Generator[Any, None, None]],
    seconds: float = float("inf"),
    epoch: int = 0,
    mark: Callable[[Any], int] | None = None,
) -> Speed:
    """Take batches until there are no more or `seconds` have passed since the first one; two at least.

    Args:
        start: opens the dataset; its time counts towards the first batch. What it yields has `nbytes`.
        epoch: bytes of an epoch, for `border_gap_s`; 0: borders are not looked at.
        mark: what is summed as fingerprint; None: `fingerprint` of a tensor ``batch *shape``.
    """
    mark = mark or fingerprint
    began = first = last = time.perf_counter()
    gap = border = 0.0
    count = size = total = 0
    with closing(start()) as batches:
        for batch in batches:
            now = time.perf_counter()
            if count == 0:
                first, skipped = now, batch.nbytes
            else:
                gap = max(gap, now - last)
                if epoch and size % epoch == 0:
                    border = max(border, now - last)
            size += batch.nbytes
            total += mark(batch)
            count += 1
            last = now
            if count > 1 and now - first >= seconds:
                break
    steady = (size - skipped) / 1e9 / max(last - first, 1e-9) if count > 1 else 0.0
    return Speed(first - began, steady, gap, border, count, total % 2**64)


def fingerprint(rows: Tensor) -> int:
    """Sum of the first, the middle and the last eight bytes of each row: a row that is lost, repeated, moved or cut
    changes it.
    """
    words = rows.flatten(1).view(torch.int64)
    return int(words[:, [0, words.shape[1] // 2, -1]].sum())


# ------------------------------------------------------------------------------------------------------------ peers


@dataclass(frozen=True)
class Rows:
    """`count` rows, each of them values of one shape and type."""

    shape: tuple[int, ...]
    dtype: str
    count: int

    @property
    def bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def per_file(self) -> int:
        return max(1, min(FILE_BYTES // self.bytes, self.count // FILES))

    def tensor(self, payload: Any) -> Tensor:
        """A row in the memory of `payload`, without a copy."""
        return torch.from_numpy(np.frombuffer(payload, self.dtype).reshape(self.shape))


def complete_torchvision() -> None:
    """mosaicml-streaming imports torchvision, whose usual wheel finds no kernels beside a CPU-only torch; its import
    then fails where it describes them. Nobody calls them here.
    """
    try:
        import torchvision  # type: ignore[import-not-found]  # noqa: F401
    except RuntimeError:
        sys.modules["torchvision._meta_registrations"] = ModuleType("torchvision._meta_registrations")


def write_streaming(rows: Rows, arrays: Iterable[np.ndarray], folder: Path) -> None:
    from streaming import MDSWriter  # type: ignore[import-not-found]

    # A column of fixed shape is the fastest: `bytes` carries its length, and slicing that off copies the payload.
    columns = {"kspace": f"ndarray:{rows.dtype}:{','.join(map(str, rows.shape))}"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=rows.per_file * (rows.bytes + 64)) as writer:
        for array in arrays:
            writer.write({"kspace": array})


def read_streaming(rows: Rows, folder: Path, epochs: int, workers: int) -> Batches:
    """mosaicml-streaming: local MDS files without compression or hashes, py1e shuffle, StreamingDataLoader."""
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory  # type: ignore[import-not-found]

    clean_stale_shared_memory()  # of a run that was killed; it refuses to start beside it
    dataset = StreamingDataset(
        local=str(folder),
        shuffle=True,
        shuffle_seed=SEED,
        batch_size=BATCH,
        num_canonical_nodes=1,
        predownload=8 * BATCH,
    )
    collate = partial(collate_column, "kspace")
    loader = StreamingDataLoader(
        dataset, batch_size=BATCH, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
    )
    for _ in range(epochs):
        yield from loader


def write_webdataset(rows: Rows, arrays: Iterable[np.ndarray], folder: Path) -> None:
    from webdataset import ShardWriter  # type: ignore[import-not-found]

    with ShardWriter(str(folder / "%05d.tar"), maxcount=rows.per_file, maxsize=1 << 62, verbose=0) as writer:
        for number, array in enumerate(arrays):
            writer.write({"__key__": f"{number:08d}", "kspace": array.tobytes()})


def read_webdataset(rows: Rows, folder: Path, epochs: int, workers: int) -> Batches:
    """webdataset: tar files of raw bytes (no decoder), shuffled files and a buffer, batches stacked in the workers."""
    import webdataset

    files = sorted(map(str, folder.glob("*.tar")))
    dataset = (
        webdataset.WebDataset(files, shardshuffle=len(files), seed=SEED)
        .shuffle(BUFFER, initial=BUFFER)
        .map(partial(raw_member, rows))
        .batched(BATCH, collation_fn=default_collate)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    for _ in range(epochs):
        yield from loader


def write_datasets(rows: Rows, arrays: Iterable[np.ndarray], folder: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([pa.field("kspace", pa.large_binary(), nullable=False)])
    writer, number = None, 0
    for array in arrays:
        if writer is None:
            writer = parquet.ParquetWriter(
                folder / f"{number:05d}.parquet",
                schema,
                compression="NONE",
                use_dictionary=False,
                write_statistics=False,
            )
            left = rows.per_file
        writer.write_table(pa.table([pa.array([array.tobytes()], pa.large_binary())], schema=schema))
        left -= 1
        if left == 0:
            writer.close()
            writer, number = None, number + 1
    if writer is not None:
        writer.close()


def read_datasets(rows: Rows, folder: Path, epochs: int, workers: int) -> Batches:
    """Hugging Face datasets: streaming Parquet, one row a row group, shuffled by row groups, Arrow format."""
    import datasets  # type: ignore[import-not-found]

    files = sorted(map(str, folder.glob("*.parquet")))
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    shuffled = dataset.reshard().shuffle(seed=SEED, buffer_size=1, max_buffer_input_shards=1).with_format("arrow")
    collate = partial(collate_arrow, rows)
    loader = DataLoader(
        shuffled, batch_size=BATCH, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
    )
    for epoch in range(epochs):
        shuffled.set_epoch(epoch)
        yield from loader


def write_npz(rows: Rows, arrays: Iterable[np.ndarray], folder: Path) -> None:
    for number, array in enumerate(arrays):
        np.savez(folder / f"{number:05d}.npz", kspace=array)


def read_npz(rows: Rows, folder: Path, epochs: int, workers: int) -> Batches:
    """torch DataLoader: one file without compression a row, full permutation."""
    order = torch.Generator().manual_seed(SEED)
    loader = DataLoader(
        Npz(sorted(folder.glob("*.npz"))),
        batch_size=BATCH,
        shuffle=True,
        generator=order,
        collate_fn=default_collate,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    for _ in range(epochs):
        yield from loader


class Npz(Dataset[Tensor]):
    def __init__(self, files: Sequence[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with np.load(self.files[index]) as file:
            return torch.from_numpy(file["kspace"])


def collate_column(column: str, samples: Sequence[dict[str, np.ndarray]]) -> Tensor:
    return default_collate([torch.from_numpy(sample[column]) for sample in samples])


def raw_member(rows: Rows, sample: dict[str, Any]) -> Tensor:
    return rows.tensor(sample["kspace"])


def collate_arrow(rows: Rows, tables: Sequence[Any]) -> Tensor:
    """Arrow tables of one row each; through `as_buffer`, since `as_py` would copy the payload."""
    return default_collate([rows.tensor(table.column(0)[0].as_buffer()) for table in tables])


@dataclass(frozen=True)
class Peer:
    """A loader of others.

    Attributes:
        folder: of its files, shared by peers of one format.
        package: that it needs beside torch and pyarrow; empty: none.
        workers: processes that read for it, 0: the caller's; None: data.py tries which number is the fastest.
    """

    folder: str
    package: str
    workers: int | None
    write: Callable[[Rows, Iterable[np.ndarray], Path], None]
    read: Callable[[Rows, Path, int, int], Batches]

    def load(self) -> None:
        """Import its package, so that no measurement contains that."""
        if self.package == "mosaicml-streaming":
            complete_torchvision()
        if self.package:
            importlib.import_module(self.package.removeprefix("mosaicml-"))


PEERS = {
    "streaming": Peer("streaming", "mosaicml-streaming", None, write_streaming, read_streaming),
    "webdataset": Peer("webdataset", "webdataset", None, write_webdataset, read_webdataset),
    "datasets": Peer("datasets", "datasets", None, write_datasets, read_datasets),
    "npz": Peer("npz", "", 2, write_npz, read_npz),
    "npz0": Peer("npz", "", 0, write_npz, read_npz),
}


# --------------------------------------------------------------------------------------------------------- requests


def arrays(shards: Path) -> Iterator[np.ndarray]:
    """Stored values of every row of a dataset of ours, all views one after the other along the slices."""
    import pyarrow.parquet as pq

    for path in sorted((shards / "shards").glob("*.parquet")):
        file = pq.ParquetFile(path)
        dtype = file.schema_arrow.metadata[b"kmtr.dtype"].decode()
        for group in range(file.num_row_groups):
            for row in file.read_row_group(group).to_pylist():
                views = [name.removeprefix("kspace_") for name in row if name.startswith("kspace_") and row[name]]
                parts = [np.frombuffer(row[f"kspace_{v}"], dtype).reshape(*row[f"shape_{v}"], 2) for v in views]
                yield np.concatenate(parts)


def write(peer: Peer, rows: Rows, source: Path, folder: Path) -> None:
    """Our dataset `source` in the peer's own format, whole or not at all."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    peer.write(rows, arrays(source), unfinished)
    unfinished.rename(folder)


def version(peer: Peer) -> str:
    """Name and version of what is measured; empty: not installed."""
    package = peer.package or "torch"
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return ""


def answer(request: dict[str, Any]) -> Any:
    """Answer to a request.

    ``{"do": "version", "peer"}``: as `version`.
    ``{"do": "write", "peer", "rows", "source", "folder"}``: nothing, when it is written.
    ``{"do": "read", "peer", "rows", "runs": [{"folder", "epochs", "seconds", "epoch", "workers"}]}``: their `Speed`s.
    """
    peer = PEERS[request["peer"]]
    if request["do"] == "version":
        return version(peer)
    rows = Rows(tuple(request["rows"]["shape"]), request["rows"]["dtype"], request["rows"]["count"])
    peer.load()
    if request["do"] == "write":
        write(peer, rows, Path(request["source"]), Path(request["folder"]))
        return {}
    return [
        asdict(
            measure(
                partial(peer.read, rows, Path(run["folder"]), run["epochs"], run["workers"]),
                run["seconds"],
                run["epoch"],
            )
        )
        for run in request["runs"]
    ]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")  # torch's, that a row's memory is read-only
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    print(json.dumps(answer(json.loads(sys.argv[1]))), flush=True)
