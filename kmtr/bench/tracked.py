"""Process of `bench.py tracking`: steps of training that are tracked, while the MLflow server comes and goes."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from kmtr import tracking
from kmtr.bench.mlflow_server import Server
from kmtr.bench.step_worker import WARM, Worker
from kmtr.config import override
from kmtr.train.engine import ShardedEngine

BLOCK = 10
"""Steps of a block."""
KINDS = ("up", "down", "off")
"""Kinds of blocks: the server runs; it does not; nothing is tracked while it runs."""
METRICS = 12
"""Metrics of a step; a run that logs at every step has as many."""
SETTLE_S = 3.0
"""Time between a change of the server and the next step."""


def tracked(worker: Worker) -> dict[str, Any]:
    """Seconds of steps by kind of block, in turns; seconds of the calls; and what MLflow has of it at the end."""
    folder, config = Path(worker.config.storage.root), worker.config
    server = Server(folder)
    try:
        server.start()
        server.wait_until_up()
        config = override(config, {"tracking.uri": server.uri})
        run_id = tracking.open_run(config, name="bench-tracking")
        spool = tracking.Spool(folder / "spool", server.uri, run_id, worker.tell)
        engine, batches = ShardedEngine(worker.model(), config, worker.world, worker.device), worker.batches(config)
        seconds: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
        calls: list[float] = []
        step = 0
        for number in range(-1, config.bench.pairs):
            for kind in KINDS if number % 2 else reversed(KINDS):
                _arrange(server, kind)
                block: list[float] = []
                for _ in range(BLOCK if number >= 0 else WARM):
                    block.append(worker.timed(partial(worker.step, engine, next(batches), worker.stages[0], config)))
                    if kind != "off":
                        began = time.perf_counter()
                        spool.metrics(step, {f"train/metric_{i}": float(step * i) for i in range(METRICS)})
                        calls.append(time.perf_counter() - began)
                    step += 1
                if number >= 0:
                    seconds[kind].append(block)
            worker.tell(f"blocks {number + 1}/{config.bench.pairs} of each kind")
        _arrange(server, "up")
        spool.end("FINISHED")
        unsent = spool.close(120.0)
        kept = tracking.history(folder / "spool")
        there = tracking.recorded(server.uri, run_id, kept)
        return {
            "seconds": seconds,
            "calls": calls,
            "unsent": unsent,
            "records": sum(map(len, kept.values())),
            "history_equal": {name: sorted(points) for name, points in kept.items()} == there,
        }
    finally:
        server.kill()


def _arrange(server: Server, kind: str) -> None:
    """The server as a block wants it, and a pause, so that its start takes no time of the steps."""
    server.kill()
    if kind != "down":
        server.start()
        server.wait_until_up()
    time.sleep(SETTLE_S)
