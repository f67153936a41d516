"""A run on two nodes of which one is killed and comes back: a process of its own, since it starts a cluster.

python tests/train/two_nodes.py CONFIG.json      prints one line of JSON: the outcome, and the workers of each leg
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

TIMEOUT_S = 300


def wait_for(what: str, found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if result := found():
            return result
        time.sleep(0.1)
    raise TimeoutError(what)


def layouts(folder: Path) -> list[tuple[int, int]]:
    """(first step, workers) as the newest whole checkpoint has it."""
    for head in sorted(folder.glob("train/checkpoint_*/checkpoint.json"), reverse=True):
        try:
            known = json.loads(head.read_text())["progress"]["layouts"]
        except (OSError, ValueError):  # being written, or removed
            continue
        return [(step, layout["workers"]) for step, layout in known]
    return []


def known(folder: Path) -> bool:
    """True if the controller of Ray Train has registered a checkpoint of the run."""
    snapshot = folder / "train" / "checkpoint_manager_snapshot.json"
    return snapshot.is_file() and '"checkpoint_dir_name"' in snapshot.read_text()


def held(job: dict[str, Any]) -> dict[str, Any]:
    """A training worker whose first two groups wait, behind their checkpoints, for what happens to them.

    The group of two that began the run waits at step 12, the group of one at step 17; who goes on after that ends it.
    """
    from kmtr.data.loader import pipeline
    from kmtr.train.loop import train_worker

    batches = pipeline.batches

    def waiting(config: Any, reader: Any, plan: Any, steps: range, rank: int, world: int, wanted: Any) -> Iterator[Any]:
        last = 17 if world == 1 else 12 if steps.start == 0 else -1
        for step, batch in zip(steps, batches(config, reader, plan, steps, rank, world, wanted), strict=True):
            while step == last:
                time.sleep(0.1)
            yield batch

    pipeline.batches = waiting
    return train_worker(job)


def kill_and_bring_back(cluster: Any, node: Any, folder: Path, seen: dict[str, float]) -> None:
    """Kill a node after the run's first checkpoints, bring it back after the first checkpoint of one worker."""
    wait_for("a checkpoint that Ray Train knows", lambda: known(folder))  # one that it does not is not gone on from
    cluster.remove_node(node, allow_graceful=False)
    seen["killed"] = time.monotonic()
    wait_for("a checkpoint of one worker", lambda: [w for _, w in layouts(folder)] == [2, 1])
    seen["went_on"] = time.monotonic()
    cluster.add_node(num_cpus=1)
    wait_for("a checkpoint of two workers again", lambda: [w for _, w in layouts(folder)] == [2, 1, 2])
    seen["grew"] = time.monotonic()


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster

    from kmtr.config import from_json
    from kmtr.train import driver

    config = from_json(Path(sys.argv[1]).read_text())
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "45"  # of workers on a node whose loss is not known yet
    noticed_soon = {"health_check_failure_threshold": 2, "health_check_period_ms": 1000}
    cluster = Cluster(
        initialize_head=True,
        connect=False,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": noticed_soon},
    )
    node = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, namespace="kmtr", log_to_driver=False, logging_level=logging.ERROR)
    resolved, dataset = driver.resolve(config)
    _, folder = driver.run_folder(resolved, dataset)
    driver.train_worker = held
    seen: dict[str, float] = {}
    with ThreadPoolExecutor(1) as other:  # a node can be started by the main thread only
        run = other.submit(driver.fit, config)
        kill_and_bring_back(cluster, node, folder, seen)
        outcome = run.result()
    ray.shutdown()
    cluster.shutdown()
    sys.stdout.write(json.dumps({"outcome": asdict(outcome), "layouts": layouts(folder), "seen": sorted(seen)}) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    main()
