"""Both studies from their command to their report, on real Ray: tables, MLflow, and the same command again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import command
import pytest
from forked_workers import instead_of_ray_train

from jobs import study
from kmtr import tracking
from kmtr.config import RunConfig, override
from kmtr.config.recipes import tiny
from kmtr.studies import labels, variants
from kmtr.studies.variants import Group
from kmtr.tracking.store import client
from kmtr.types import KmtrError

pytestmark = pytest.mark.ray

SMALL = {
    "train.workers": 1,
    "study.seeds": (0,),
    "study.labels": (6, 12),
    "study.ablation_labels": (6, 12),
    "study.longer_steps": 2,
    "study.steps": 2,
    "study.scratch_steps": 2,
    "study.copies": 2,
    "study.ablation_steps": 4,
    "study.ablation_align_steps": 2,
    "evaluate.bootstrap": 50,
}


@pytest.fixture
def config(small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A study whose trainings are forked processes: that Ray Train starts them is no promise of a study."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    instead_of_ray_train(monkeypatch)
    return override(small, SMALL | {"storage.root": str(tmp_path)})


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
    cluster: None, config: RunConfig, monkeypatch: pytest.MonkeyPatch
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


def test_ablation_from_its_command_to_its_report(
    cluster: None, config: RunConfig, monkeypatch: pytest.MonkeyPatch
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


def test_mlflow_takes_the_names_of_all_variants(tmp_path: Path) -> None:
    spool = tracking.Spool(tmp_path, f"sqlite:///{tmp_path}/unused.db", "0" * 32)
    names = [f"s_per_step/{group.name}/{name}" for group in variants.GROUPS for name in group.variants]
    spool.metrics(0, dict.fromkeys(names, 0.0))
    spool.close(0.0)
    assert len(names) == len(set(names)) > len(tiny().study.seeds)
