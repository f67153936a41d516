"""A search whose command, whose shell and one of whose nodes are killed: eight trials in all, none of them twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import command
import pytest

from kmtr import tracking
from kmtr.config import RunConfig, override
from kmtr.tracking.store import client
from kmtr.train import driver

pytestmark = [pytest.mark.ray, pytest.mark.full, pytest.mark.xdist_group("faults"), pytest.mark.timeout(1800)]

STEPS = 12
SEARCH = {
    "train.workers": 1,
    "train.cpus_per_worker": 1.0,
    "masked.steps": STEPS,
    "train.checkpoint_every": 4,
    "train.eval_every": 4,
    "search.trials": 8,
    "search.scheduler": "none",
    "search.confirm": "0x0",
    "search.space.masked.mask_ratio": "uniform(0.3,0.9)",
}


def starts(folder: Path) -> list[int]:
    """Steps at which workers began or went on with a run."""
    return [step for step, _ in tracking.history(folder / driver.SPOOL)["run/workers"]]


def test_a_search_survives_its_command_its_shell_and_a_node(config: RunConfig, tmp_path: Path) -> None:
    config = override(config, SEARCH)
    root = Path(config.storage.root)
    place = tmp_path / "told"
    place.mkdir()
    (place / "search.json").write_text(json.dumps(command.words(config)))
    script = [sys.executable, str(Path(__file__).with_name("searched.py")), str(place / "search.json"), str(place)]
    top = Path(__file__).parents[2]
    ended = subprocess.run(
        script, capture_output=True, text=True, timeout=1750, check=False, env=os.environ | {"PYTHONPATH": str(top)}
    )
    text = (place / "said.txt").read_text() if (place / "said.txt").is_file() else ""
    assert ended.returncode == 0, ended.stderr[-3000:] + text[-3000:]
    killed: dict[str, Any] = json.loads((place / "killed.json").read_text())

    assert text.count("its process, with its node; it goes on") <= 1  # it may have been on the other node
    assert "Traceback" not in text

    (path,) = root.glob("search-*/search.json")
    runs = json.loads(path.read_text())
    assert [(run["number"], run["status"]) for run in runs] == [(number, "finished") for number in range(8)]
    assert killed["second"]["status"] == 1
    assert "is at work on it since" in killed["second"]["said"]
    assert "is finished, reused" in killed["last"]

    store = client(tracking.tracking_uri(config))
    found = store.search_runs([store.get_experiment_by_name("kmtr").experiment_id])
    (parent,) = (run for run in found if run.data.tags["search.kind"] == "search")
    children = [run for run in found if run is not parent]
    assert parent.info.run_id == killed["result"]["run_id"]
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert sorted(int(child.data.tags["search.trial"]) for child in children) == list(range(8))
    assert {run.info.status for run in found} == {"FINISHED"}
    for child in children:
        steps = [point.step for point in store.get_metric_history(child.info.run_id, "masked/loss")]
        assert sorted(steps) == list(range(1, STEPS + 1)), "each step once"

    names = {run["number"]: run["name"] for run in runs}
    hit = {killed[what]["number"]: killed[what]["reports"][-1][0] for what in ("driver", "node")}
    for number, name in names.items():
        begun = starts(root / name)
        assert begun[0] == 0
        assert len(begun) == 1 or (number in hit and len(begun) == 2), (number, begun)
        if len(begun) == 2:
            assert begun[1] >= hit[number], "it went on from what it had reported"
    for number in hit:
        assert len(starts(root / names[number])) == 2, f"trial {number} was killed"
