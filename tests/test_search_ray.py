"""A whole search on real Ray Tune: parent and children in MLflow, what ASHA stops, and the same command again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import command
import numpy as np
import pytest

from kmtr import tracking
from kmtr.config import RunConfig, override
from kmtr.tracking.store import client
from kmtr.train import guard, held
from kmtr.types import InputError
from tune import scheduler, search
from tune.ledger import Trial
from tune.plan import rungs

pytestmark = pytest.mark.ray

R = "sampling.accelerations"


@pytest.fixture
def words(small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The small recipe as a command line, with storage and tracking of its own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    changes = {
        "train.workers": 1,
        "storage.root": str(tmp_path),
        "train.eval_every": 2,
        "search.trials": 2,
        f"search.space.{R}": "grid(2,4)",
        "search.grace_steps": 2,
        "search.confirm": "0x0",
    }
    return command.words(override(small, changes))


def test_a_search_from_its_command_to_its_best_trial(
    cluster: None, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dry = search.run([*words, "search.dry_run=true"])
    assert dry["values"] == [{R: (2,)}, {R: (4,)}]
    assert not list(tmp_path.glob("search-*"))  # it only says what would run
    assert "one bracket, eta 2, grace 2 steps; looks at 2, 4" in capsys.readouterr().out

    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)  # a trap: MLflow would write into this run
    result = search.run(words)
    printed = capsys.readouterr().out
    config = search.recipe_config(words, "")
    parent, children = of_mlflow(config, result["run_id"])
    ledger = read_ledger(tmp_path)

    assert parent.info.status == "FINISHED"
    assert parent.info.run_name.startswith("search-tiny-")
    assert len(children) == len(ledger) == 2
    for run in ledger:
        check_child(run, children[run["run_id"]], config)
    best = max((run for run in ledger if run["status"] == "finished"), key=lambda run: run["result"])
    assert result["best_run_id"] == best["run_id"] == parent.data.tags["best/run_id"]
    assert result["metrics"]["score"] == parent.data.metrics["best/score"] == best["result"]
    steps = sum(run["reports"][-1][0] for run in ledger)
    assert result["steps_fraction"] == pytest.approx(steps / (2 * config.total_steps), abs=1e-4)
    assert json.loads(json.dumps(result))["best"] == {R: best["values"][R]}
    assert result["verdict"].startswith(f"not confirmed: trial {best['number']}")
    assert f"  verdict   {result['verdict']}" in printed
    assert parent.data.tags["search.verdict"] == result["verdict"]
    assert result["verdict"] in parent.data.tags["mlflow.note.content"]
    assert Path(result["encoder"]).is_dir()
    files = {file.path for file in store_of(config).list_artifacts(parent.info.run_id)}
    assert {"search.html", "interactive.html", "keys.png", "curves.png", "parallel.png"} <= files

    assert search.run(words) == result
    assert "finished, reused" in capsys.readouterr().out
    assert len(of_mlflow(config, result["run_id"])[1]) == 2


@pytest.mark.full
def test_the_best_trial_and_the_recipe_run_again_with_fresh_seeds(
    cluster: None, words: list[str], tmp_path: Path
) -> None:
    """Asked for later, they go on from the trials that there are."""
    first = search.run(words)
    trials = read_ledger(tmp_path)
    later = [word for word in words if not word.startswith("search.confirm=")]
    result = search.run([*later, "search.confirm=1x2", "search.noise_seeds=3", "tracking.encoder=reader"])
    config = search.recipe_config(words, "")
    known = {str(k): str(v) for k, v in store_of(config).get_registered_model("reader").aliases.items()}
    assert known == {"best": "1"} | ({"confirmed": "1"} if result["confirmed"] else {})
    assert result["registered"] == "models:/reader@best"
    version = store_of(config).get_model_version("reader", "1")
    assert (version.run_id, version.description) == (result["best_run_id"], result["verdict"])
    parent, children = of_mlflow(config, result["run_id"])
    ledger = read_ledger(tmp_path)
    assert result["run_id"] == first["run_id"]
    assert ledger[:2] == trials
    assert [(run["number"], run["seed"]) for run in ledger[2:]] == [
        *((-1, seed) for seed in (1, 2, 3)),
        *((first["best_trial"], seed) for seed in (1, 2)),
    ]
    assert len(children) == len(ledger) == 7
    for run in ledger:
        check_child(run, children[run["run_id"]], config)
    assert "noise SD" in result["verdict"]
    assert parent.data.metrics["search/noise_sd"] == result["metrics"]["noise_sd"]

    finished = [run for run in ledger if run["status"] == "finished"]
    said = [held.Held.read(tmp_path / run["name"], config.total_steps) for run in finished]
    for one, run in zip(said, finished, strict=True):  # whatever values and seed: the same subjects are asked
        np.testing.assert_array_equal(one.columns[0].truth, said[0].columns[0].truth)
        assert one.statistic(np.ones((1, one.subjects)))[0] == pytest.approx(run["result"], rel=1e-4, abs=1e-5)


def store_of(config: RunConfig) -> Any:
    return client(tracking.tracking_uri(config))


def of_mlflow(config: RunConfig, run_id: str) -> tuple[Any, dict[str, Any]]:
    """The parent of a search, and its children by id."""
    store = store_of(config)
    parent = store.get_run(run_id)
    found = store.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{run_id}'")
    return parent, {child.info.run_id: child for child in found}


def check_child(run: dict[str, Any], child: Any, config: RunConfig) -> None:
    """MLflow says of a run what the ledger says."""
    stopped, tags = run["status"] == "stopped", child.data.tags
    assert tags["search.kind"] == ("trial" if run["seed"] is None else "recipe" if run["number"] < 0 else "confirm")
    assert tags["search.trial"] == str(run["number"])
    assert child.info.status == ("KILLED" if stopped else "FINISHED")
    assert tags["search.stopped"] == ("asha" if stopped else "no")
    for key, value in run["values"].items():
        text = ",".join(map(str, value))
        assert child.data.params[key] == tags[f"search.{key}"] == text
        assert child.info.run_name.startswith(f"{run['number']:02d} {key}={text}")
    history = store_of(config).get_metric_history(child.info.run_id, guard.MEAN)
    reported = {point.step: point.value for point in history}
    assert [step for step, _ in run["reports"]] == sorted(reported)
    for step, score in run["reports"]:
        assert reported[step] == pytest.approx(score)


def read_ledger(root: Path) -> list[dict[str, Any]]:
    (path,) = root.glob("search-*/search.json")
    return list(json.loads(path.read_text()))


def test_asha_stops_the_worse_half_and_never_at_the_last_report(small: RunConfig, tmp_path: Path) -> None:
    """On Tune's own scheduler, without trials: rungs at 2 and 4 of 8 steps."""
    config = override(small, {"masked.steps": 6, "align.steps": 2, "search.grace_steps": 2})
    assert rungs(config) == [2, 4]

    class Runner:
        def __init__(self, number: int) -> None:
            self.trial_id, self.config = f"trial-{number}", {"trial": {"name": f"s-{number}"}}

    good, bad, late = Runner(0), Runner(1), Runner(2)
    asha = scheduler.Halving(config, [])
    for runner in (good, bad, late):
        asha.on_trial_add(None, runner)

    def told(runner: Runner, step: int, score: float) -> str:
        return asha.on_trial_result(None, runner, {"step": step, guard.MEAN: score})

    assert told(good, 2, 0.8) == "CONTINUE"
    assert told(bad, 2, 0.1) == "STOP"
    assert asha.stopped == {"s-1"}
    assert told(late, 8, -1.0) == "CONTINUE"
    assert told(good, 4, 0.9) == "CONTINUE"

    stopped = {"step": 4, guard.MEAN: -1.0, "ended": 1.0}
    assert asha.on_trial_result(None, late, stopped) == "CONTINUE"  # the guard ended it: what it leaves is exported

    before = [
        Trial(0, "s-0", {}, None, "finished", ((2, 0.8), (4, 0.9), (8, 0.9))),
        Trial(2, "s-2", {}, reports=((2, 0.9),)),
    ]
    resumed = scheduler.Halving(config, before)
    for runner in (bad, late):
        resumed.on_trial_add(None, runner)
    assert resumed.on_trial_result(None, bad, {"step": 2, guard.MEAN: 0.1}) == "STOP"
    assert resumed.on_trial_result(None, late, {"step": 3, guard.MEAN: 0.1}) == "CONTINUE"  # it had passed that rung


def test_another_search_under_the_same_name_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = [*words, "run.name=mine", "search.dry_run=true"]
    search.run(mine)
    config = search.recipe_config(mine, "")
    known = search.identity(config, "another dataset")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / search.IDENTITY).write_text(json.dumps(known))
    with pytest.raises(InputError, match=r"run\.name: search mine had another data, another dataset, got"):
        search.run(mine)
    with pytest.raises(InputError, match=r"search\.earlier: expected search\.sampler=tpe"):
        search.run([*words, "search.earlier=mine"])
    with pytest.raises(InputError, match=r"search\.earlier: expected the name of a search in .*, got 'other'"):
        search.run([*words, "search.sampler=tpe", "search.earlier=other"])


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


@pytest.mark.full
def test_a_population_on_ray_tune(cluster: None, words: list[str], tmp_path: Path) -> None:
    """Four members of six steps that are compared twice: each time the last goes on from the state of the first."""
    members = [word for word in words if not word.startswith(("search.", "masked.steps=", "align.steps="))]
    asked = ["stage=masked", "masked.steps=6", "search.scheduler=pbt", "search.trials=4", "search.grace_steps=2"]
    result = search.run([*members, *asked, "search.space.masked.learning_rate=loguniform(0.0001,0.01)"])
    config = search.recipe_config([*members, *asked], "")
    ledger = {run["name"]: run for run in read_ledger(tmp_path)}
    children = [run for run in ledger.values() if run["donor"]]
    assert [(child["generation"], child["begun"]) for child in children] == [(1, 2), (2, 4)]
    assert sorted(run["status"] for run in ledger.values()) == ["finished"] * 4 + ["stopped"] * 2
    assert not result["confirmed"]
    store = store_of(config)
    for child in children:
        donor = ledger[child["donor"]]
        assert child["reports"][0] == donor["reports"][[step for step, _ in donor["reports"]].index(child["begun"])]
        run = store.get_run(child["run_id"])
        assert (run.info.status, run.data.tags["search.donor"]) == (
            "FINISHED" if child["status"] == "finished" else "KILLED",
            donor["name"],
        )
        steps = sorted(point.step for point in store.get_metric_history(child["run_id"], "masked/loss"))
        assert steps == list(range(child["begun"] + 1, child["reports"][-1][0] + 1))
    assert of_mlflow(config, result["run_id"])[0].info.status == "FINISHED"
