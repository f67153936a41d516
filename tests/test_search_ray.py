"""A whole search on real Ray Tune: parent and children in MLflow, what ASHA stops, and the same command again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import command
import pytest

from kmtr import tracking
from kmtr.config import RunConfig, override
from kmtr.tracking.store import client
from kmtr.types import InputError
from tune import scheduler, search, space
from tune.ledger import Trial

pytestmark = pytest.mark.ray


@pytest.fixture
def words(small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The small recipe as a command line, with storage and tracking of its own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    changes = {
        "train.workers": 1,
        "storage.root": str(tmp_path),
        "train.eval_every": 2,
        "search.trials": 2,
        "search.accelerations": (2, 4),
        "search.grace_steps": 2,
    }
    return command.words(override(small, changes))


def test_a_search_from_its_command_to_its_best(
    cluster: None, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)  # a trap: MLflow would write into this run
    result = search.run(words)
    printed = capsys.readouterr().out
    config = search.recipe_config(words, "")
    store = client(tracking.tracking_uri(config))
    parent = store.get_run(result["run_id"])
    children = store.search_runs(
        [parent.info.experiment_id],
        f"tags.mlflow.parentRunId = '{parent.info.run_id}'",
        order_by=["tags.`search.trial`"],
    )
    ledger = read_ledger(tmp_path)

    assert parent.info.status == "FINISHED"
    assert parent.info.run_name.startswith("search-tiny-")
    assert [child.data.tags["search.trial"] for child in children] == ["0", "1"]
    for child, values, trial in zip(children, space.trials(config), ledger, strict=True):
        for key, value in values.items():
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert child.data.params[key] == text
            assert child.data.tags[f"search.{key}"] == text
        stopped = trial["status"] == "stopped"
        assert child.info.status == ("KILLED" if stopped else "FINISHED")
        assert child.data.tags["search.stopped"] == ("asha" if stopped else "no")
        assert child.info.run_id == trial["run_id"]
        reported = {point.step: point.value for point in store.get_metric_history(child.info.run_id, scheduler.SCORE)}
        for step, score in trial["reports"]:
            assert reported[step] == pytest.approx(score)

    best = max((t for t in ledger if t["status"] == "finished"), key=lambda t: t["reports"][-1][1])
    assert result["best_run_id"] == best["run_id"] == parent.data.tags["best/run_id"]
    assert result["metrics"]["probe_r2"] == parent.data.metrics["best/probe_r2"] == best["reports"][-1][1]
    assert json.loads(json.dumps(result))["best"] == best["values"]
    assert f"best      trial {best['number']}" in printed
    assert Path(result["encoder"]).is_dir()

    again = search.run(words)
    assert again == result
    assert "finished, reused" in capsys.readouterr().out
    assert len(store.search_runs([parent.info.experiment_id])) == 3


def read_ledger(root: Path) -> list[dict[str, Any]]:
    (path,) = root.glob("search-*/search.json")
    return list(json.loads(path.read_text()))


def test_asha_stops_the_worse_half_and_never_at_the_last_report(small: RunConfig, tmp_path: Path) -> None:
    """On Tune's own scheduler, without trials: rungs at 2 and 4 of 8 steps."""
    config = override(small, {"masked.steps": 6, "align.steps": 2, "search.grace_steps": 2})

    class Runner:
        def __init__(self, number: int) -> None:
            self.trial_id, self.config = f"trial-{number}", {"trial": {"number": number}}

    good, bad, late = Runner(0), Runner(1), Runner(2)
    asha = scheduler.Halving(config, [])
    for runner in (good, bad, late):
        asha.on_trial_add(None, runner)

    def told(runner: Runner, step: int, score: float) -> str:
        return asha.on_trial_result(None, runner, {"step": step, scheduler.SCORE: score})

    assert told(good, 2, 0.8) == "CONTINUE"
    assert told(bad, 2, 0.1) == "STOP"
    assert asha.stopped == {1}
    assert told(late, 8, -1.0) == "CONTINUE"
    assert told(good, 4, 0.9) == "CONTINUE"

    resumed = scheduler.Halving(config, [Trial(0, "a", {}, "finished", ((2, 0.8), (4, 0.9), (8, 0.9)))])
    resumed.on_trial_add(None, bad)
    assert resumed.on_trial_result(None, bad, {"step": 2, scheduler.SCORE: 0.1}) == "STOP"


def test_a_search_that_cannot_run_is_refused(cluster: None, words: list[str]) -> None:
    with pytest.raises(InputError, match=r"search\.concurrent: 9 trial"):
        search.run([*words, "search.concurrent=9"])


def test_what_a_killed_trial_reserved_is_given_back(cluster: None) -> None:
    """Only that: not what a living actor, or this driver, reserved."""
    import ray
    from ray.util import placement_group, placement_group_table, remove_placement_group

    @ray.remote(num_cpus=0)
    class Controller:
        def reserve(self) -> str:
            self.group = placement_group([{"CPU": 0.5}])
            ray.get(self.group.ready())
            return str(self.group.id.hex())

    kind: Any = Controller
    dead, living = kind.remote(), kind.remote()
    orphan, kept = ray.get([dead.reserve.remote(), living.reserve.remote()])
    mine = placement_group([{"CPU": 0.5}])
    ray.get(mine.ready())
    ray.kill(dead)
    deadline = time.monotonic() + 300
    while not scheduler.release_orphans():
        assert time.monotonic() < deadline, "Ray never noticed that the actor died"
        time.sleep(0.2)
    while placement_group_table()[orphan]["state"] != "REMOVED":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert scheduler.release_orphans() == 0
    assert placement_group_table()[kept]["state"] == "CREATED"
    assert placement_group_table()[mine.id.hex()]["state"] == "CREATED"
    remove_placement_group(mine)
    ray.kill(living)
