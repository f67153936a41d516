"""Two studies from their command to their report: tables, MLflow, and the same command again.

By default their tasks are run here, one after the other, and their trainings by forked processes. That Ray runs both is
proved by single tasks below, and by the search, whose trainings start from within its trials; the marker `full` adds
the ablation, and both studies on Ray.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import command
import pytest
from forked_workers import instead_of_ray_train

from jobs import study
from kmtr import tracking
from kmtr.config import RunConfig, override
from kmtr.config.recipes import tiny
from kmtr.data.dataset.reader import Dataset
from kmtr.evaluate import predictions
from kmtr.studies import ablation, comparison, labels, running, variants
from kmtr.studies.comparison import Source
from kmtr.studies.variants import Group
from kmtr.tracking.store import client
from kmtr.types import KmtrError

SMALL = {
    "train.workers": 1,
    "study.seeds": (0,),
    "study.labels": (6, 12),
    "study.ablation_labels": (6, 12),
    "study.longer_steps": 2,
    "study.steps": 2,
    "study.scratch_steps": 2,
    "study.copies": 1,
    "study.ablation_steps": 4,
    "study.ablation_align_steps": 2,
    "evaluate.accelerations": (2,),
    "evaluate.bootstrap": 50,
}


def one_by_one(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], *_: Any, **wanted: Any) -> Iterator[Any]:
    """`running.ended`, without Ray."""
    return (function(*job) for job in jobs)


@pytest.fixture
def config(small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return override(small, SMALL | {"storage.root": str(tmp_path)})


@pytest.fixture(params=["here", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.full])])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tasks run. Trainings that the study itself starts are forked in either place."""
    instead_of_ray_train(monkeypatch)
    if request.param == "ray":
        request.getfixturevalue("cluster")
        return
    monkeypatch.setattr(running, "ended", one_by_one)
    monkeypatch.setattr(running, "uses_gpus", lambda _: False)  # there is no cluster to ask
    for module in (running, ablation):
        monkeypatch.setattr(module, "start_ray", lambda: None)


def told(config: RunConfig, run_id: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) of what MLflow holds, as it was said."""
    history = client(tracking.tracking_uri(config)).get_metric_history(run_id, metric)
    return [(point.step, point.value) for point in sorted(history, key=lambda point: point.timestamp)]


def children(config: RunConfig, run_id: str) -> list[str]:
    """Status of the trainings of a study."""
    store = client(tracking.tracking_uri(config))
    experiment = store.get_run(run_id).info.experiment_id
    found = store.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'")
    return [child.info.status for child in found]


def results(said: dict[str, Any]) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return dict(json.loads(Path(said["results"]).read_text(), parse_constant=refuse))


def test_labels_from_its_command_to_its_report_and_on_with_more_seeds(
    place: None, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = study.run(["labels", *command.words(config)])
    found = results(said)
    assert set(found["r2"]) == set(labels.TITLES)
    assert all(set(of_budget) == {"6", "12"} for of_budget in found["r2"].values())
    assert {one["labels"] for one in said["differences"]} == {6, 12}
    assert Path(said["report"]).is_file()
    assert children(config, said["run_id"]) == ["FINISHED"] * 2  # both stages, and masked pretraining for longer
    first = told(config, said["run_id"], "r2_R2/masked")
    assert sorted(first) == [
        (budget, pytest.approx(found["r2"]["masked"][str(budget)]["2"]["mean"])) for budget in (6, 12)
    ]

    more = override(config, {"study.seeds": (0, 1)})
    again = study.run(["labels", *command.words(more)])
    assert again["run_id"] == said["run_id"]
    found = results(again)
    assert list(found["r2_of_seeds"]) == ["0", "1"]
    assert children(config, said["run_id"]) == ["FINISHED"] * 3
    anew = told(config, said["run_id"], "r2_R2/masked")
    assert anew[: len(first)] == first
    assert dict(anew)[6] == pytest.approx(found["r2"]["masked"]["6"]["2"]["mean"]) != dict(first)[6]

    def fails(*_: object) -> None:
        raise KmtrError("no report")

    monkeypatch.setattr(labels, "report", fails)
    with pytest.raises(KmtrError, match="no report"):
        study.run(["labels", *command.words(more)])
    assert client(tracking.tracking_uri(config)).get_run(said["run_id"]).info.status == "FAILED"


@pytest.mark.full
def test_ablation_from_its_command_to_its_report(
    place: None, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a name, and a seed that is none of the study's. No variant is the recipe's own choice of its stage."""
    group = Group("alignment alone", "?", {"without the masked loss": {"align.masked_weight": 0.0}}, stage="both")
    monkeypatch.setattr(variants, "GROUPS", (group,))
    words = command.words(override(config, {"study.seeds": (1,), "run.name": "mine"}))
    said = study.run(["ablation", *words])
    assert said["failed"] == []
    rows = {(row["variant"], row["labels"]): row for row in results(said)["rows"]}
    assert set(rows) == {(v, n) for v in ("seed 0", "seed 1", "without the masked loss") for n in (6, 12)}
    assert rows["seed 0", 6]["own"]
    low, high = rows["without the masked loss", 6]["interval"]
    assert low <= rows["without the masked loss", 6]["difference"] <= high
    assert low < high
    assert len({row["run"] for row in rows.values()}) == 3
    assert all(row["run"].startswith("mine-") for row in rows.values())
    assert children(config, said["run_id"]) == ["FINISHED"] * 4
    metric = "r2/alignment alone/without the masked loss"
    points = told(config, said["run_id"], metric)
    assert sorted(step for step, _ in points) == [6, 12]
    assert client(tracking.tracking_uri(config)).get_run(said["run_id"]).info.status == "FINISHED"

    assert study.run(["ablation", *words])["run_id"] == said["run_id"]
    assert len(children(config, said["run_id"])) == 4
    assert told(config, said["run_id"], metric) == points, "what has not changed is not said again"


@pytest.mark.ray
def test_the_tasks_of_a_study_run_on_ray(cluster: None, config: RunConfig, tmp_path: Path) -> None:
    """Features and probes as here; at most so many tasks side by side; and one that fails says why in one line."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import tests
    cohorts = [
        comparison.cohort(config, Dataset.open(config.data), tmp_path / name, (6, 12)) for name in ("ray", "here")
    ]
    source = Source("lowres", seeds=(0,), augmented=True)
    comparison.probe_all(cohorts[0], {(0, "lowres-augmented"): source})
    for budget in cohorts[1].budgets:
        comparison.write_features(cohorts[1], source, 2, budget)
    comparison.write_probes(cohorts[1], source, "lowres-augmented", 0)
    for budget in cohorts[1].budgets:
        ours, theirs = (predictions.read(comparison.part(c, 0, "lowres-augmented", budget)) for c in cohorts)
        assert ours.equals(theirs)

    def alone(number: int) -> int:
        (tmp_path / "alone").mkdir()  # it must not be there
        (tmp_path / "alone").rmdir()
        return number**2

    assert list(running.ended(alone, [(n,) for n in range(4)], at_once=1, num_cpus=0)) == [0, 1, 4, 9]

    def fails(number: int) -> None:
        raise KmtrError(f"subject {number} is odd")

    with pytest.raises(KmtrError, match=r"^study: features: .*subject 3 is odd$") as error:
        running.each(fails, [(3,)], "study: features", "cpu")
    assert "\n" not in str(error.value)


def test_mlflow_takes_the_names_of_all_variants(tmp_path: Path) -> None:
    spool = tracking.Spool(tmp_path, f"sqlite:///{tmp_path}/unused.db", "0" * 32)
    names = [f"s_per_step/{group.name}/{name}" for group in variants.GROUPS for name in group.variants]
    spool.metrics(0, dict.fromkeys(names, 0.0))
    spool.close(0.0)
    assert len(names) == len(set(names)) > len(tiny().study.seeds)
