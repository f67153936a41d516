"""python -m kmtr.bench.paths REQUEST      our paths and their bounds, each in a process of its own; see data.py

REQUEST is JSON, the last line on stdout as well.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Generator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from kmtr import machine
from kmtr.bench.peers import BATCH, SEED, Rows, measure
from kmtr.config import RunConfig, from_json, override
from kmtr.data.dataset import shards
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import pipeline, planning
from kmtr.data.loader.order import Plan, Source
from kmtr.ray_start import start_ray
from kmtr.types import KmtrError

OURS = ("threads", "ray")
BOUNDS = ("raw", "pyarrow")


def rows_of(config: RunConfig, count: int) -> Rows:
    """A row is all that the recipe's batches hold of a subject, ``slice coil t ky kx 2``."""
    d = config.data
    return Rows((d.slices, d.coils, d.frames, *d.matrix, 2), config.shards.dtype, count)


def raw(config: RunConfig, epochs: int) -> Generator[memoryview, None, None]:
    """The files of the dataset, one after the other, into one buffer of a batch's size."""
    buffer = np.empty(BATCH * rows_of(config, BATCH).bytes, np.uint8).data  # in huge pages, as our own batches
    for _ in range(epochs):
        for path in parquet_files(config):
            file = os.open(path, os.O_RDONLY)
            try:
                at = 0
                while count := os.preadv(file, [buffer], at):
                    at += count
                    yield buffer[:count]
            finally:
                os.close(file)


def pyarrow(config: RunConfig, epochs: int) -> Generator[pa.Table, None, None]:
    """Row groups in random order, decoded to Arrow tables by one thread; not stacked."""
    verify = config.data.verify_pages != "never"
    files = [
        pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=verify) for path in parquet_files(config)
    ]
    places = [(file, group) for file in files for group in range(file.num_row_groups)]
    columns = [f"kspace_{view}" for view in config.data.views]
    rng = np.random.default_rng(SEED)
    for _ in range(epochs):
        for number in rng.permutation(len(places)):
            file, group = places[number]
            yield file.read_row_group(group, columns=columns, use_threads=False)


def ours(config: RunConfig, epochs: int) -> Generator[Tensor, None, None]:
    """Batches as a training worker gets them, by ``data.loader``."""
    dataset = Dataset.open(config.data)
    plan = planning.plan_of(config, dataset)
    steps = range(epochs * plan.steps_per_epoch)
    for batch in pipeline.batches(config, dataset.reader("train", config.data), plan, steps, 0, 1):
        yield batch.stored


def parquet_files(config: RunConfig) -> list[Path]:
    return sorted(Path(config.data.root, "shards").glob("*.parquet"))


def planned(config: RunConfig) -> dict[str, Any]:
    """A plan for ``bench.plan_subjects`` of the recipe's size, and every worker's share of two steps."""
    world, subjects = config.bench.plan_workers, config.bench.plan_subjects
    batch = -(-config.data.global_batch // world) * world
    per_group = max(1, shards.ROW_GROUP_BYTES // rows_of(config, subjects).bytes)
    groups = [(subjects // per_group, per_group), (1, subjects % per_group)]
    before = machine.peak()
    began = time.perf_counter()
    source = Source(subjects, np.array([run for run in groups if run[1]]), np.array([(subjects, 0)]))
    plan = Plan([source], batch, config.seed, config.plan.tail, config.plan.window)
    times = []
    for step in (0, plan.step_of(1, plan.steps_per_epoch // 2)):
        taken = np.concatenate([plan.share(step, rank, world).row for rank in range(world)])
        if len(np.unique(taken)) != batch:
            raise KmtrError(f"plan: expected {batch} different rows at step {step}, got {len(np.unique(taken))}")
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
    return {
        "subjects": subjects,
        "world_size": world,
        "global_batch": batch,
        "steps_per_epoch": plan.steps_per_epoch,
        "plan_ready_s": round(times[0], 3),
        "next_epoch_s": round(times[1], 3),
        "peak_rss_gib": round(machine.peak() / 2**30, 3),
        "rss_before_gib": round(before / 2**30, 3),
    }


def answer(request: dict[str, Any]) -> Any:
    """In a process of its own: ``{"path", "config", "runs": [{"folder", "epochs", "seconds", "epoch"}, ...]}``."""
    path, config = request["path"], from_json(request["config"])
    if path == "plan":
        return planned(config)
    if path == "ray":
        start_ray()  # a cluster is there before anybody reads: not part of the first batch
    read = {"raw": raw, "pyarrow": pyarrow}.get(path, ours)
    mark = None if path in OURS else unmarked
    speeds = []
    for run in request["runs"]:
        here = override(config, {"data.root": run["folder"], "data.loader": path if path in OURS else "threads"})
        speeds.append(asdict(measure(partial(read, here, run["epochs"]), run["seconds"], run["epoch"], mark)))
    return speeds


def unmarked(_: Any) -> int:
    return 0


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))), flush=True)
