"""A search of eight trials on two nodes whose command, whose shell and one of whose nodes are killed on the way.

python tests/faults/searched.py SEARCH.json FOLDER     in a cluster of its own; SEARCH.json: words of tune/search.py
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from survived import PATIENCE_S, wait_for

SEARCH = Path(__file__).parents[2] / "tune" / "search.py"
DRIVER, SHELL, NODE = 1, 3, 6
"""Trials during which something is killed."""


def running_trial(root: Path, number: int) -> dict[str, Any] | None:
    """A trial that has reported something and has not ended."""
    for path in root.glob("search-*/search.json"):
        for run in json.loads(path.read_text()):
            if (run["number"], run["status"]) == (number, "waiting") and run["reports"]:
                return dict(run)
    return None


def conduct(words: list[str], folder: Path) -> None:
    from ray.cluster_utils import Cluster

    noticed_soon = {"health_check_failure_threshold": 2, "health_check_period_ms": 1000}
    cluster = Cluster(
        initialize_head=True,
        connect=False,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": noticed_soon},
    )
    node = cluster.add_node(num_cpus=2)  # all workers are there
    environment = os.environ | {
        "RAY_ADDRESS": cluster.address,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "45",  # of workers on a node whose loss is not known yet
    }
    command = [sys.executable, str(SEARCH), *words]
    root = Path(next(word for word in words if word.startswith("storage.root=")).partition("=")[2])
    said = folder / "said.txt"
    killed: dict[str, Any] = {}

    def begin(words: list[str]) -> subprocess.Popen[bytes]:
        with said.open("ab") as file:
            return subprocess.Popen(words, env=environment, stdout=file, stderr=file)

    def during(number: int, running: psutil.Process | subprocess.Popen[bytes]) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            assert running.is_running() if isinstance(running, psutil.Process) else running.poll() is None
            return running_trial(root, number)

        return wait_for(f"trial {number}", look, 4 * PATIENCE_S)

    running = begin(command)
    killed["driver"] = during(DRIVER, running)
    running.kill()
    running.wait()

    shell = begin(["sh", "-c", f"{shlex.join(command)}; exit $?"])
    driver = wait_for("the driver of the shell", lambda: psutil.Process(shell.pid).children())[0]
    killed["shell"] = during(SHELL, driver)
    shell.kill()
    shell.wait()
    second = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    killed["node"] = during(NODE, driver)
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=2)
    _, error = second.communicate()
    killed["second"] = {"status": second.returncode, "said": error.strip().splitlines()[-1]}
    driver.wait()
    last = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    cluster.shutdown()
    assert last.returncode == 0, last.stderr[-3000:] + said.read_text()[-3000:]
    killed["result"] = json.loads(last.stdout.splitlines()[-1])
    killed["last"] = last.stdout
    (folder / "killed.json").write_text(json.dumps(killed))


if __name__ == "__main__":
    os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_raylet_start_wait_time_s": "300"}
    conduct(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
