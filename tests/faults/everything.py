"""A run of two nodes in which a worker, the controller, a node and the command die, and the node comes back.

python tests/faults/everything.py CONFIG.json FOLDER        the whole, in a cluster of its own; prints a line of JSON
python tests/faults/everything.py CONFIG.json FOLDER drive  the training command, which that starts (twice)

Every worker writes down which subjects each of its steps took. The first worker waits at the steps of `HOLDS` until
what is to happen there has happened.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from survived import process_of, wait_for

WORKER, CONTROLLER, NODE, BACK, COMMAND = HOLDS = (7, 13, 19, 25, 31)
"""Steps at which something happens; a checkpoint is written every third step."""
TIMEOUT_S = 300


def worker(job: dict[str, Any]) -> dict[str, Any]:
    """`train_worker` that writes down its subjects, and waits."""
    from kmtr.data.loader import pipeline
    from kmtr.train.loop import train_worker

    batches, folder = pipeline.batches, Path(job["told"])

    def told(config: Any, reader: Any, plan: Any, steps: range, rank: int, world: int, wanted: Any) -> Iterator[Any]:
        read = batches(config, reader, plan, steps, rank, world, wanted)
        with (folder / f"samples-{os.getpid()}-{time.time_ns()}.jsonl").open("w") as file:
            for step, batch in zip(steps, read, strict=True):
                if rank == 0 and step in HOLDS:
                    (folder / f"at-{step}-{world}").touch()
                    while not (folder / f"go-{step}").exists():
                        time.sleep(0.05)
                taken = {name: batch.meta[name].tolist() for name in ("key", "epoch", "repeated")}
                group = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                record = {"t": time.time_ns(), "step": step, "group": group, "world": world} | taken
                file.write(json.dumps(record) + "\n")
                file.flush()
                yield batch

    pipeline.batches = told
    return train_worker(job)


def drive(config: Path, folder: Path) -> None:
    """The training command."""
    from kmtr import cli
    from kmtr.config import from_json
    from kmtr.train import trainer

    def run(_: list[str]) -> dict[str, Any]:
        from kmtr.train import driver

        cli.start_ray()
        trainer.train_worker = worker
        original = trainer.trainer_of
        trainer.trainer_of = lambda config, job, *more: original(config, job | {"told": str(folder)}, *more)
        return {"run_id": driver.fit(from_json(config.read_text())).run_id}

    cli.main("usage", run)


def conduct(config: Path, folder: Path) -> None:
    from ray.cluster_utils import Cluster

    noticed_soon = {"health_check_failure_threshold": 2, "health_check_period_ms": 1000}
    cluster = Cluster(
        initialize_head=True,
        connect=False,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": noticed_soon},
    )
    node = cluster.add_node(num_cpus=1)
    environment = os.environ | {
        "RAY_ADDRESS": cluster.address,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "45",  # of workers on a node whose loss is not known yet
    }
    words = [sys.executable, __file__, str(config), str(folder), "drive"]

    def command() -> subprocess.Popen[bytes]:
        with (folder / "said.txt").open("ab") as said:
            return subprocess.Popen(words, env=environment, stdout=said, stderr=said)

    def at(step: int, world: int, running: subprocess.Popen[bytes]) -> None:
        place = folder / f"at-{step}-{world}"
        wait_for(place.name, lambda: place.exists() or running.poll() is not None)
        assert running.poll() is None, (folder / "said.txt").read_text()[-3000:]

    running = command()
    at(WORKER, 2, running)
    wait_for("a worker", lambda: process_of("ray::RayTrainWorker")).kill()
    (folder / f"go-{WORKER}").touch()
    at(CONTROLLER, 2, running)
    wait_for("the controller", lambda: process_of("ray::TrainController")).kill()
    (folder / f"go-{CONTROLLER}").touch()
    at(NODE, 2, running)
    cluster.remove_node(node, allow_graceful=False)
    (folder / f"go-{NODE}").touch()
    at(BACK, 1, running)
    cluster.add_node(num_cpus=1)
    at(BACK, 2, running)
    (folder / f"go-{BACK}").touch()
    at(COMMAND, 2, running)
    running.kill()
    running.wait()
    (folder / f"go-{COMMAND}").touch()
    status = command().wait(TIMEOUT_S)
    cluster.shutdown()
    said = (folder / "said.txt").read_text()
    assert status == 0, said[-3000:]
    sys.stdout.write(json.dumps({"run_id": json.loads(said.splitlines()[-1])["run_id"]}) + "\n")


if __name__ == "__main__":
    os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_raylet_start_wait_time_s": "300"}
    (drive if sys.argv[3:] else conduct)(*map(Path, sys.argv[1:3]))
