"""bench.py data: one clock, every row once, numbers that a dashboard can read; refusals on one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs import bench
from kmtr.bench import data as bench_data
from kmtr.bench import peers as bench_peers
from kmtr.bench.data import Measured
from kmtr.bench.process import ask
from kmtr.config import RunConfig, override
from kmtr.config.recipes import tiny
from kmtr.report import figures
from kmtr.report.html import png
from kmtr.types import InputError, KmtrError

SMALL = [
    "tiny",
    "data.views=sax,lax_4ch",
    "data.frames=4",
    "data.matrix=32,32",
    "model.patch=2,8,8",
    "sampling.accelerations=2,4",
    "evaluate.accelerations=2,4",
    "bench.gib=0.004",
    "bench.seconds=0.2",
    "bench.repeats=1",
]


def config(tmp_path: Path, *words: str) -> RunConfig:
    pairs = (word.split("=", 1) for word in (*SMALL[1:], *words))
    changes = dict(pairs) | {"bench.folder": str(tmp_path / "data"), "storage.root": str(tmp_path / "runs")}
    return override(tiny(), changes)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected what to measure, one of data, step, tracking, search, got ''"),
        (["speed"], "got 'speed', which is none of them"),
        (["scale", "base"], "got 'scale', which is not built yet"),
        (["data", "huge"], "recipe: expected one of tiny, base, large, got 'huge'"),
        (["data", "bench.peers=npz,tensorflow"], "bench.peers"),
        (["data", "bench.epochs=1"], "bench.epochs"),
        (["data", "bench.folder=s3://bucket/bench"], "bench.folder: expected a local folder"),
        (["data", "bench.gib=1e9", "bench.peers="], "of room, got"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(InputError) as error:
        bench.run(words)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------- clock


class Clock:
    """Time that only batches move: a busy machine changes nothing."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def slow(self, waits: list[float]) -> Generator[torch.Tensor, None, None]:
        for number, wait in enumerate(waits):
            self.now += wait
            yield torch.full((2, 6), number, dtype=torch.float64)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(bench_peers, "time", clock)
    return clock


def test_the_clock_leaves_the_first_batch_out_and_knows_the_borders(clock: Clock) -> None:
    speed = bench_peers.measure(lambda: clock.slow([0.2, 0.01, 0.15, 0.01, 0.05, 0.3]), epoch=2 * 96)
    assert speed.batches == 6
    assert speed.first_batch_s == pytest.approx(0.2)
    assert speed.gap_s == pytest.approx(0.3)
    assert speed.border_gap_s == pytest.approx(0.15), "batches 2 and 4 begin an epoch"
    assert speed.gb_s == pytest.approx(5 * 96 / 1e9 / 0.52)


def test_time_ends_a_measurement_and_its_iterator(clock: Clock) -> None:
    closed = []

    def endless() -> Generator[torch.Tensor, None, None]:
        try:
            yield from clock.slow([0.02] * 10_000)
        finally:
            closed.append(True)

    speed = bench_peers.measure(endless, seconds=0.09)
    assert speed.batches == 6, "the first starts the clock, the sixth is the first beyond the end"
    assert closed == [True]


def test_a_fingerprint_knows_lost_repeated_and_cut_rows_but_not_their_order() -> None:
    rows = torch.from_numpy(np.random.default_rng(0).random((8, 3, 5, 4)).astype(np.float16))

    def total(order: list[int]) -> int:
        return sum(bench_peers.fingerprint(rows[order[i : i + 4]]) for i in (0, 4)) % 2**64

    everything = list(range(8))
    assert total(everything) == total(everything[::-1])
    assert total(everything) != total([0, *everything[:-1]])
    rows[3, -1, -1, -4:] = 0
    assert total(everything) != bench_peers.fingerprint(torch.from_numpy(rows.numpy() + np.float16(1)))


# ------------------------------------------------------------------------------------------------------------ dataset


def test_a_row_is_what_the_recipe_reads_and_peers_hold_the_same(tmp_path: Path) -> None:
    small = config(tmp_path)
    data = bench_data.written(small, "test", 8)
    bench_data.translated(data, "npz")
    assert data.rows.shape == (3, 1, 4, 32, 32, 2)
    assert data.rows.bytes == 3 * 4 * 32 * 32 * 2 * 2
    ours = list(bench_peers.arrays(data.folder / "ours"))
    theirs = list(bench_peers.read_npz(data.rows, data.folder / "npz", 2, 0))
    assert len(ours) == 8
    assert [batch.shape for batch in theirs] == [(4, *data.rows.shape)] * 4
    assert sum(map(bench_peers.fingerprint, theirs)) % 2**64 == 2 * data.fingerprint % 2**64
    assert {row.tobytes() for row in ours} == {row.numpy().tobytes() for batch in theirs for row in batch}
    before = (data.folder / "rows.json").stat().st_mtime_ns
    assert bench_data.written(small, "test", 8) == data, "reused"
    assert (data.folder / "rows.json").stat().st_mtime_ns == before


# ------------------------------------------------------------------------------------------------------------ program


def test_memory_counts_what_a_child_of_the_child_holds(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import subprocess, sys, time\n"
        "if len(sys.argv) > 2: held = bytearray(b'x') * (300 << 20); time.sleep(1.5)\n"
        "else: subprocess.run([sys.executable, __file__, '', 'child']); print('chatter'); print('{\"done\": true}')\n"
    )

    answer, memory = ask([sys.executable, str(program)], {}, 60.0, {})
    assert answer == {"done": True}
    assert 0.29 < memory < 0.45


def test_a_failing_program_says_its_last_words(tmp_path: Path) -> None:

    with pytest.raises(KmtrError, match="ValueError: too tired"):
        ask([sys.executable, "-c", "raise ValueError('too tired')"], {}, 60.0, {})
    with pytest.raises(KmtrError, match="longer than 1 s"):
        ask([sys.executable, "-c", "import time; time.sleep(60)"], {}, 1.0, {})


def measured(rate: float) -> Measured:
    return Measured([rate, 9 * rate, rate / 9], [1.0, 3.0, 2.0], [0.1, 0.5, 0.2], [0.1, 0.7, 0.2], [1.0, 2.0, 1.0])


def test_ratios_need_every_peer(tmp_path: Path) -> None:
    small = config(tmp_path, "bench.peers=npz,npz0")
    paths = {"raw": 9.0, "pyarrow": 4.0, "threads": 3.0, "ray": 1.0, "npz": 2.0, "npz0": 1.5}
    found = bench_data.summarise(small, {path: measured(rate) for path, rate in paths.items()})
    assert (found["bandwidth_gb_s"], found["threads_gb_s"], found["raw_gb_s"]) == (1.0, 3.0, 9.0)
    assert found["peers"] == {"npz": 2.0, "npz0": 1.5}
    assert (found["ratio_to_best_peer"], found["ray_ratio_to_best_peer"]) == (1.5, 0.5)
    assert (found["first_batch_s"], found["longest_gap_s"]) == (2.0, 0.7)
    assert found["memory_gib"]["ray"] == 2.0
    del paths["npz0"]
    partial = bench_data.summarise(small, {path: measured(rate) for path, rate in paths.items()})
    assert partial["ratio_to_best_peer"] is None


def test_a_missing_environment_leaves_our_own_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "PEERS_PYTHON", tmp_path / "none" / "bin" / "python")
    assert list(bench_data.versions(("streaming", "npz", "datasets"))) == ["npz"]


@pytest.mark.slow
def test_a_plan_without_files() -> None:
    found = bench.run(["data", "bench.plan_subjects=20001", "bench.plan_workers=24", "plan.tail=drop"])
    assert (found["subjects"], found["world_size"], found["global_batch"]) == (20001, 24, 72)
    assert found["steps_per_epoch"] == 20001 // 72
    assert found["plan_ready_s"] > 0
    assert 0 < found["peak_rss_gib"] < 2


@pytest.mark.full
@pytest.mark.ray
@pytest.mark.slow
def test_a_whole_measurement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = ["data", *SMALL, "bench.peers=npz0", f"bench.folder={tmp_path / 'data'}", f"storage.root={tmp_path}"]
    found = json.loads(json.dumps(bench.run(words)))
    for key in ("bandwidth_gb_s", "threads_gb_s", "raw_gb_s", "pyarrow_gb_s", "ratio_to_best_peer", "first_batch_s"):
        assert found[key] > 0, key
    assert found["peers"].keys() == {"npz0"}
    assert found["memory_gib"].keys() == {"raw", "pyarrow", "threads", "ray", "npz0"}
    kept: dict[str, Any] = json.loads(Path(found["results"]).read_text())
    assert kept["rounds"]["ray"]["gb_s"][0] == pytest.approx(found["bandwidth_gb_s"], abs=1e-3)
    assert "torch DataLoader" in kept["settings"]["npz0"]
    assert Path(found["figure"]).read_bytes().startswith(b"\x89PNG")
    assert isinstance(found["load"], float)
    assert "longest wait s" in capsys.readouterr().out


def test_the_chart_is_drawn() -> None:
    rates = {"raw": [7.0, 8.0], "ray": [0.8, 0.9], "npz": [1.4, 1.6]}
    figure = figures.speeds(rates, dict.fromkeys(rates, 1.0), {"raw": "bound", "ray": "ours", "npz": "peer"}, "Speed")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["ray", "npz", "raw"]
    png(figure)
