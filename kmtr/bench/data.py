"""Speed of the data plane beside other loaders: one set of bytes, one clock, every path in a process of its own.

The job is the same for all: rows in random order, every row once an epoch, batches of `BATCH` rows stacked into one
torch tensor of the values as stored, no cast. Two paths bound it: `raw` (the same files into one buffer) and `pyarrow`
(row groups to Arrow, not stacked). The page cache is warm for all: each one's files are read once before it begins.
Measurements go round by round (`bench.repeats`), so that what else the machine does meets all of them.

What a row is follows from the recipe: its views, slices, coils, frames and matrix; values are noise, which no format
compresses. A second, smaller dataset is read for whole epochs: it shows the waits at their borders, and that every
path delivers each row once an epoch, by sums over their bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kmtr.bench import peers
from kmtr.bench.paths import BOUNDS, OURS, rows_of
from kmtr.bench.peers import BATCH, FOREVER, PEERS, SEED, Rows, arrays, fingerprint
from kmtr.bench.process import ROOT, ask
from kmtr.config import RunConfig, override, to_json
from kmtr.data.dataset import shards, storage
from kmtr.data.dataset.manifest import write_manifest
from kmtr.report import figures
from kmtr.report.html import Table, text_table
from kmtr.types import InputError, KmtrError, Study, View

PEERS_PYTHON = ROOT / "runs" / "bench-env" / "bin" / "python"
MISSING = "not installed: make bench"

BORDERS_SHARE = 8
"""The dataset read for whole epochs has this part of the other's rows."""

FASTEST = 20e9
"""Bytes a second that nobody reaches: so many epochs a path is asked for that time ends it."""

WORKERS = (0, 1, 2, 4)
"""Processes that a peer may read with; as many as there are CPUs at most."""

TRIED_S = 1.5
"""One trial of a number of workers; each has two, the better counts."""

BUSY = 0.5
"""Load for each CPU, before the first measurement, from which on numbers are not to be trusted."""

OPENING_S = 300.0
"""Time that a path may take to start and to end, on a busy machine."""


def run(config: RunConfig) -> dict[str, Any]:
    """Measure, print and keep; what the last line on stdout says."""
    if config.bench.plan_subjects:
        print(
            f"bench: plan of {config.bench.plan_subjects} subjects for {config.bench.plan_workers} workers", flush=True
        )
        answer, _ = ask_ours("plan", config, [])
        return answer
    if "://" in config.bench.folder:
        raise InputError(f"bench.folder: expected a local folder, since peers read it too, got {config.bench.folder!r}")
    one_worker = {
        "data.global_batch": BATCH,
        "data.more": (),
        "data.weights": (),
        "stage": "masked",  # alignment wants more subjects in a batch
        "train.workers": 1,
        "train.accumulation": 1,
    }
    config = override(config, one_worker)
    load = load_of_machine()
    installed = versions(config.bench.peers)
    for name in config.bench.peers:
        print(f"bench: {name}, {installed.get(name, MISSING)}", flush=True)
    count = max(4 * BATCH, round(config.bench.gib * 2**30 / rows_of(config, 1).bytes / BATCH) * BATCH)
    whole = written(config, "the dataset", count)
    small = written(config, "the one for epochs", max(4 * BATCH, count // BORDERS_SHARE // BATCH * BATCH))
    for peer in installed:
        for data in (whole, small):
            translated(data, peer)
    workers = {peer: fastest_workers(peer, whole) for peer in installed}
    measured, failed = rounds(config, whole, small, workers)
    summary = summarise(config, measured)
    missing = {peer: MISSING for peer in config.bench.peers if peer not in installed}
    print(text_table(table(measured, failed | missing, whole)))
    result = summary | {
        "peers_failed": failed | missing,
        "versions": installed,
        "workers": workers,
        "load": round(load, 2),
    }
    return result | keep(config, result, measured, whole)


# ---------------------------------------------------------------------------------------------------------- dataset


@dataclass(frozen=True)
class Bytes:
    """One dataset in the format of each loader: ``folder/ours``, ``folder/streaming``, ...

    Attributes:
        rows: their number is a multiple of `BATCH`.
        fingerprint: sum of `peers.fingerprint` over all rows, modulo 2^64.
    """

    folder: Path
    rows: Rows
    fingerprint: int

    @property
    def bytes(self) -> int:
        return self.rows.count * self.rows.bytes


def load_of_machine() -> float:
    """Processes that want a core, over the last minute; said where they are so many that nothing is to be trusted."""
    load = os.getloadavg()[0]
    if load > BUSY * (os.cpu_count() or 1):
        print(f"bench: the machine is busy (load {load:.1f}): don't trust times, rates and ratios", flush=True)
    return load


def noise(number: int, config: RunConfig) -> Study:
    """A subject of the recipe's shapes: uniform noise, a function of its number."""
    d = config.data
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([SEED, number])))
    views: dict[str, View] = {}
    for view in d.views:
        values = rng.random((d.slots(view), d.coils, d.frames, *d.matrix, 2), np.float32) - np.float32(0.5)
        views[view] = View(values.view(np.complex64)[..., 0])
    return Study(f"noise-{number:08d}", views)


def written(config: RunConfig, name: str, count: int) -> Bytes:
    """Our dataset of `count` rows in ``bench.folder``, written unless it is there.

    Raises:
        InputError: no room for it.
    """
    rows = rows_of(config, count)
    shape = "x".join(map(str, rows.shape))
    layout = hashlib.sha256(f"{config.data.views} {config.data.sax_slices} {config.shards.rows}".encode()).hexdigest()
    folder = Path(storage.absolute(config.bench.folder)) / f"{count}x{shape}-{rows.dtype}-{layout[:6]}"
    data = Bytes(folder, rows, 0)
    root, told = str(folder / "ours"), folder / "rows.json"
    if not told.is_file():
        check_room(folder, data.bytes)
        began = time.perf_counter()
        per_file = config.shards.rows
        parts = [
            shards.finished_shard(root, f"train-{first // per_file:05d}")
            or shards.write_shard(
                root,
                f"train-{first // per_file:05d}",
                "train",
                (noise(i, config) for i in range(first, min(first + per_file, count))),
                rows.dtype,
            )
            for first in range(0, count, per_file)
        ]
        write_manifest(root, parts, rows.dtype, f"bench {folder.name}")
        total = sum(fingerprint(rows.tensor(array)[None]) for array in arrays(Path(root)))
        told.write_text(json.dumps({"fingerprint": total % 2**64}))
        print(f"bench: {name}, {count} rows of {rows.bytes / 1e6:.1f} MB written in {since(began)}", flush=True)
    return Bytes(folder, rows, json.loads(told.read_text())["fingerprint"])


def translated(data: Bytes, peer: str) -> None:
    """The same rows in a peer's own format, written unless they are there."""
    folder = data.folder / PEERS[peer].folder
    if folder.is_dir():
        return
    check_room(data.folder, data.bytes)
    began = time.perf_counter()
    source = str(data.folder / "ours")
    ask_peer(peer, {"do": "write", "peer": peer, "rows": asdict(data.rows), "source": source, "folder": str(folder)})
    print(f"bench: {data.rows.count} rows as {PEERS[peer].folder} in {since(began)}", flush=True)


def check_room(folder: Path, needed: int) -> None:
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed * 1.1:
        raise InputError(
            f"bench.folder: expected {needed / 2**30:.1f} GiB of room, got {free / 2**30:.1f} GiB; choose another "
            "bench.folder or a smaller bench.gib"
        )


def warm(folder: Path) -> None:
    """Read all files once, so that they come out of the page cache."""
    buffer = bytearray(16 << 20)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


# ------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Measured:
    """One path in all rounds; the medians count, of waits and memory the most. See `peers.Speed`."""

    gb_s: list[float] = field(default_factory=list)
    first_batch_s: list[float] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)
    border_gap_s: list[float] = field(default_factory=list)
    memory_gib: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(self.gb_s)

    @property
    def longest_gap_s(self) -> float:
        """Longest wait of any round, at borders and elsewhere."""
        return max(self.gap_s + self.border_gap_s)


def rounds(
    config: RunConfig, whole: Bytes, small: Bytes, workers: dict[str, int]
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Every path `bench.repeats` times, in turns.

    Args:
        workers: of each peer that is measured.

    Returns:
        What was measured, and the peers that failed with their last words.

    Raises:
        KmtrError: one of our own paths failed.
    """
    measured: dict[str, Measured] = {}
    failed: dict[str, str] = {}
    for number in range(config.bench.repeats):
        for path in (*BOUNDS, *OURS, *workers):
            if path in failed:
                continue
            try:
                speeds, memory = once(config, path, whole, small, workers.get(path, 0))
            except KmtrError as error:
                if path not in workers:
                    raise KmtrError(f"bench: {path}: {error}") from None
                failed[path] = str(error)
                print(f"  {number + 1}/{config.bench.repeats}  {path:<12}failed: {error}", flush=True)
                continue
            steady, epochs = speeds
            entry = measured.setdefault(path, Measured())
            entry.gb_s.append(steady["gb_s"])
            entry.first_batch_s.append(steady["first_batch_s"])
            entry.gap_s.append(max(steady["gap_s"], epochs["gap_s"]))
            entry.border_gap_s.append(epochs["border_gap_s"])
            entry.memory_gib.append(memory)
            print(
                f"  {number + 1}/{config.bench.repeats}  {path:<12}{steady['gb_s']:6.2f} GB/s   first batch "
                f"{steady['first_batch_s']:5.2f} s   longest wait {entry.gap_s[-1]:5.2f} s   {memory:5.2f} GiB",
                flush=True,
            )
    return {path: entry for path, entry in measured.items() if path not in failed}, failed


def once(config: RunConfig, path: str, whole: Bytes, small: Bytes, workers: int) -> tuple[list[dict[str, Any]], float]:
    """One path: a time on the whole dataset, then epochs of the small one; and its peak memory in GiB.

    Raises:
        KmtrError: it failed, or did not deliver every row once an epoch.
    """
    bench = config.bench
    seconds = [bench.seconds, 1e9]
    epochs = [math.ceil(bench.seconds * FASTEST / whole.bytes), bench.epochs]
    folder = PEERS[path].folder if path in PEERS else "ours"
    runs = []
    for data, n, s in zip((whole, small), epochs, seconds, strict=True):
        warm(data.folder / folder)
        run = {"folder": str(data.folder / folder), "epochs": n, "seconds": s, "epoch": data.bytes, "workers": workers}
        runs.append(run)
    if path in PEERS:
        request = {"do": "read", "peer": path, "rows": asdict(whole.rows), "runs": runs}
        speeds, memory = ask_peer(path, request, OPENING_S + 10 * bench.seconds)
    else:
        speeds, memory = ask_ours(path, config, runs)
    wanted = bench.epochs * small.fingerprint % 2**64
    if path not in BOUNDS and speeds[1]["fingerprint"] != wanted:
        raise KmtrError(f"expected every row once in each of {bench.epochs} epochs, got others")
    return speeds, memory


def fastest_workers(peer: str, data: Bytes) -> int:
    """Number of own processes with which a peer reads fastest on this machine."""
    fixed = PEERS[peer].workers
    if fixed is not None:
        return fixed
    folder = data.folder / PEERS[peer].folder
    warm(folder)
    tried = [n for n in WORKERS if n <= (os.cpu_count() or 1)] * 2
    run = {"folder": str(folder), "epochs": FOREVER, "seconds": TRIED_S, "epoch": 0}
    runs = [run | {"workers": n} for n in tried]
    try:
        speeds, _ = ask_peer(peer, {"do": "read", "peer": peer, "rows": asdict(data.rows), "runs": runs}, OPENING_S)
    except KmtrError:
        return 0  # the measurement will say why
    best = max(zip(speeds, tried, strict=True), key=lambda pair: pair[0]["gb_s"])
    print(f"bench: {peer} reads fastest with {best[1]} worker(s) of its own", flush=True)
    return best[1]


def ask_ours(path: str, config: RunConfig, runs: list[dict[str, Any]]) -> tuple[Any, float]:
    request = {"path": path, "config": to_json(config), "runs": runs}
    limit = OPENING_S + 10 * config.bench.seconds
    return ask([sys.executable, "-m", "kmtr.bench.paths"], request, limit, {})


def ask_peer(peer: str, request: dict[str, Any], limit_s: float = 3600.0) -> tuple[Any, float]:
    """Peers that need nothing but torch run in our environment."""
    python = str(PEERS_PYTHON) if PEERS[peer].package else sys.executable
    cache = str(PEERS_PYTHON.parents[1] / "hugging-face")
    return ask([python, "-P", str(Path(peers.__file__))], request, limit_s, {"HF_HOME": cache})


def versions(peers: tuple[str, ...]) -> dict[str, str]:
    """Peer -> version, of those that are installed."""
    found = {}
    for peer in peers:
        if not PEERS[peer].package or PEERS_PYTHON.is_file():
            found[peer], _ = ask_peer(peer, {"do": "version", "peer": peer})
    return {peer: version for peer, version in found.items() if version}


# ------------------------------------------------------------------------------------------------------- reporting


def summarise(config: RunConfig, measured: dict[str, Measured]) -> dict[str, Any]:
    """The last line's numbers. Ratios are null unless every peer asked for was measured."""
    rates = {path: entry.rate for path, entry in measured.items()}
    peers = {peer: rates[peer] for peer in config.bench.peers if peer in rates}
    best = max(peers.values()) if peers and len(peers) == len(config.bench.peers) else None
    ray = measured["ray"]
    return {
        "bandwidth_gb_s": round(rates["ray"], 3),
        "threads_gb_s": round(rates["threads"], 3),
        "raw_gb_s": round(rates["raw"], 3),
        "pyarrow_gb_s": round(rates["pyarrow"], 3),
        "peers": {peer: round(rate, 3) for peer, rate in peers.items()},
        "ratio_to_best_peer": round(max(rates[path] for path in OURS) / best, 3) if best else None,
        "ray_ratio_to_best_peer": round(rates["ray"] / best, 3) if best else None,
        "first_batch_s": round(statistics.median(ray.first_batch_s), 3),
        "longest_gap_s": round(ray.longest_gap_s, 3),
        "memory_gib": {path: round(max(entry.memory_gib), 2) for path, entry in measured.items()},
    }


def table(measured: dict[str, Measured], failed: dict[str, str], data: Bytes) -> Table:
    rows: list[tuple[str | float | None, ...]] = []
    for path, entry in measured.items():
        waits = (statistics.median(entry.first_batch_s), max(entry.gap_s), max(entry.border_gap_s))
        spread = f"{min(entry.gb_s):.2f} to {max(entry.gb_s):.2f}"
        rows.append((path, entry.rate, spread, *((None,) * 3 if path in BOUNDS else waits), max(entry.memory_gib)))
    notes = ["raw and pyarrow stack no batches. Ray itself had started before its first batch."]
    notes += [f"{peer}: {why}" for peer, why in failed.items()]
    return Table(
        caption=f"Rows of {data.rows.bytes / 1e6:.1f} MB in random order, {BATCH} to a tensor; "
        f"{data.bytes / 2**30:.1f} GiB in a warm page cache, {os.cpu_count()} CPUs",
        columns=("path", "GB/s", "of all rounds", "first batch s", "longest wait s", "at borders s", "memory GiB"),
        rows=tuple(rows),
        note="\n".join(notes),
        digits=2,
    )


def keep(config: RunConfig, result: dict[str, Any], measured: dict[str, Measured], data: Bytes) -> dict[str, str]:
    """``data.json`` and ``data.png`` in ``storage.root/bench``; their paths."""
    kinds = {path: "bound" if path in BOUNDS else "ours" if path in OURS else "peer" for path in measured}
    figure = figures.speeds(
        {path: entry.gb_s for path, entry in measured.items()},
        {path: max(entry.memory_gib) for path, entry in measured.items()},
        kinds,
        f"Shuffled rows of {data.rows.bytes / 1e6:.1f} MB to tensors of {BATCH}, {os.cpu_count()} CPUs",
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=144)
    whole = result | {
        "rounds": {path: asdict(entry) for path, entry in measured.items()},
        "rows": data.rows.count,
        "row_bytes": data.rows.bytes,
        "settings": {path: " ".join((PEERS[path].read.__doc__ or "").split()) for path in measured if path in PEERS},
        "cpus": os.cpu_count(),
        "config": json.loads(to_json(config)),
    }
    store, base = storage.open_root(config.storage.root)
    store.create_dir(f"{base}/bench", recursive=True)
    storage.write_atomic(store, f"{base}/bench/data.json", json.dumps(whole, indent=1).encode())
    storage.write_atomic(store, f"{base}/bench/data.png", picture.getvalue())
    return {"results": f"{base}/bench/data.json", "figure": f"{base}/bench/data.png"}


def since(began: float) -> str:
    return f"{time.perf_counter() - began:.0f} s"
