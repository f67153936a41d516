"""The model that training on labels leaves: of the best validation, whatever happens to the run, and its early end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import forked_workers
import numpy as np
import pytest
import torch
from cohort import simulated, write
from forked_workers import Dying, instead_of_ray_train, last_checkpoint
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException

from kmtr.config import RunConfig, override
from kmtr.exported import MODEL_WEIGHTS
from kmtr.train import checkpoint, choice, driver, state
from kmtr.train.checkpoint import Progress
from kmtr.train.folder import Outcome
from kmtr.types import Study

STEPS = 12


def reversed_about_the_mean(study: Study, mean: float) -> Study:
    return replace(study, labels={**study.labels, "lvedv_ml": 2 * mean - study.labels["lvedv_ml"]})


@pytest.fixture(scope="module")
def config(small: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Labels of held-out hearts that say the opposite of the training ones: the more is learnt, the worse it is."""
    folder = tmp_path_factory.mktemp("choice")
    asked = {
        "stage": "task",
        "task.tasks": "phenotypes",
        "task.targets": "lvedv_ml",
        "task.encoder": "none",
        "task.steps": STEPS,
        "task.warmup_steps": 0,
        "task.begin": "mean",
        "task.head_factor": 1.0,
        "task.learning_rate": 0.01,
        "optimizer.schedule": "plateau",
        "optimizer.cooldown": 0.01,
        "data.root": str(folder / "data"),
        "storage.root": str(folder / "runs"),
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "train.workers": 2,
        "train.eval_every": 1,
        "train.checkpoint_every": 2,
        "optimizer.ema": 0.5,
        "train.zero_stage": 2,
    }
    made = override(small, asked)
    studies = [simulated(i, made) for i in range(24)]
    mean = float(np.mean([study.labels["lvedv_ml"] for study in studies[:16]]))
    held_out = [reversed_about_the_mean(study, mean) for study in studies[16:]]
    write(folder / "data", {"train": studies[:16], "val": held_out}, "float32")
    write(folder / "unsplit", {"train": studies}, "float32")
    return made


@pytest.fixture(scope="module", autouse=True)
def forked() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        instead_of_ray_train(patch)
        yield


def weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    return load_file(Path(outcome.encoder) / MODEL_WEIGHTS)


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of two models."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def whole(config: RunConfig) -> Outcome:
    """The run that nothing happens to."""
    return driver.fit(override(config, {"task.patience": 5}), quiet=True)


def test_it_ends_early_and_leaves_the_best_weights(whole: Outcome, config: RunConfig) -> None:
    said = whole.metrics
    assert said["best_step"] + 5 == said["step"] == said["task_stopped"] < STEPS
    assert said["validation_subjects"] == 8
    assert said["best_score"] == said["val/score"] == said["val/phenotypes_score"] > said["last_score"]
    last = driver.fit(override(config, {"task.steps": int(said["best_step"]), "task.keep": "last"}), quiet=True)
    assert last.metrics["val/score"] == pytest.approx(said["best_score"], abs=1e-6)
    assert apart(weights(last), weights(whole)) < 1e-6, "the weights of that very step"


def test_the_last_weights_are_left_where_they_are_asked_for(whole: Outcome, config: RunConfig) -> None:
    asked = override(config, {"task.patience": 5, "task.keep": "last"})
    last = driver.fit(asked, quiet=True)
    assert last.metrics["step"] == whole.metrics["step"]
    assert last.metrics["val/score"] == last.metrics["last_score"] == whole.metrics["last_score"]
    assert last.metrics["best_step"] == whole.metrics["best_step"]
    assert apart(weights(last), weights(whole)) > 1e-2
    folder = Path(last_checkpoint(Path(last.folder)).path)
    assert state.kinds(checkpoint.states(folder)) == {"weight", "exp_avg", "exp_avg_sq", "average"}, (
        "no copy for nothing"
    )


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"train.zero_stage": 0, "train.workers": 1}, id="zero0-one-worker"),
        pytest.param({"train.zero_stage": 3}, id="zero3-two", marks=pytest.mark.full),
    ],
)
def test_the_best_is_the_same_in_every_zero_stage(
    whole: Outcome, config: RunConfig, changes: dict[str, Any], tmp_path: Path
) -> None:
    asked = override(config, {"task.patience": 5, "storage.root": str(tmp_path), **changes})
    other = driver.fit(asked, quiet=True)
    assert other.metrics["best_step"] == whole.metrics["best_step"]
    assert other.metrics["best_score"] == pytest.approx(whole.metrics["best_score"], abs=1e-4)
    assert apart(weights(other), weights(whole)) < 1e-3, "AdamW's first steps enlarge the last bit"


KILLED_IN = 6
"""Number, from 0, of the step in which a worker dies."""


def test_a_killed_run_goes_on_to_the_same_best(whole: Outcome, config: RunConfig, tmp_path: Path) -> None:
    """Killed behind the best step and its checkpoint; it goes on with one worker and without ZeRO."""
    asked = override(config, {"task.patience": 5, "storage.root": str(tmp_path)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forked_workers, "WORK", Dying(KILLED_IN // 2))
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            driver.fit(asked, quiet=True)
    resumed = driver.fit(override(asked, {"train.workers": 1, "train.zero_stage": 0}), quiet=True)
    assert resumed.name == whole.name
    kept = checkpoint.read_head(Path(last_checkpoint(Path(resumed.folder)).path))["progress"]
    assert [first for first, _ in kept["layouts"]] == [0, KILLED_IN], "it went on, and did not start again"
    assert resumed.metrics["best_step"] == whole.metrics["best_step"] <= KILLED_IN
    assert resumed.metrics["best_score"] == whole.metrics["best_score"]
    assert resumed.metrics["step"] == whole.metrics["step"]
    assert resumed.metrics["last_score"] == pytest.approx(whole.metrics["last_score"], abs=1e-3)
    assert apart(weights(resumed), weights(whole)) == 0, "written before the kill, and not computed again"


def test_without_validation_subjects_the_last_step_is_left(config: RunConfig) -> None:
    root = str(Path(config.data.root).parent / "unsplit")
    outcome = driver.fit(override(config, {"data.root": root, "task.patience": 1, "task.steps": 3}), quiet=True)
    assert outcome.metrics["step"] == 3
    assert outcome.metrics["validation_subjects"] == 0
    assert not {"best_step", "val/score"} & outcome.metrics.keys(), "training subjects choose nothing"
    text, said = choice.shown(outcome.metrics, config)
    assert text == "the last step, 3, since no labels of validation subjects could choose"
    assert said == {"best": None, "last": {"step": 3, "score": None}, "validation_subjects": 0}


def test_what_a_validation_changes(config: RunConfig) -> None:
    """The first of equal scores, nothing by a score that is none, patience from the last better one on."""
    progress, patient = Progress(), override(config, {"task.patience": 2})
    told = []
    for step, score in enumerate([float("nan"), 0.3, 0.3, float("nan"), 0.4, 0.1, 0.4], start=1):
        progress.step = step
        better = choice.judge(progress, {} if score != score else {choice.SCORE: score})
        told.append((better, progress.best_step, choice.ends(progress, patient)))
    assert [better for better, *_ in told] == [False, True, False, False, True, False, False]
    assert [best for _, best, _ in told] == [0, 2, 2, 2, 5, 5, 5]
    assert [end for *_, end in told] == [False] * 6 + [True]
    assert choice.overall([0.5, float("nan"), 0.9]) == {choice.SCORE: pytest.approx(0.7)}
    assert choice.overall([float("nan")]) == {}


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (
            "best",
            "step 4 (val/score 0.500), chosen by 8 validation subjects, whose labels were used besides; "
            "the last was step 9 (val/score 0.400)",
        ),
        (
            "last",
            "the last step, step 9 (val/score 0.400), ended early by 8 validation subjects, whose labels were used "
            "besides; the best was step 4 (val/score 0.500) of 8 validation subjects",
        ),
    ],
)
def test_whose_labels_chose_is_told(config: RunConfig, keep: str, said: str) -> None:
    metrics = {"step": 9.0, "best_step": 4.0, "best_score": 0.5, "last_score": 0.4, "validation_subjects": 8.0}
    assert choice.shown(metrics, override(config, {"task.keep": keep, "task.patience": 5}))[0] == said


def test_how_it_is_validated_is_part_of_a_run_that_validation_chooses(config: RunConfig) -> None:
    other = {"train.eval_every": 3, "train.eval_subjects": 5, "evaluate.accelerations": (4,)}
    for changes, differ in (
        ({}, True),
        ({"task.keep": "last"}, False),
        ({"task.keep": "last", "task.patience": 1}, True),
    ):
        one = override(config, changes)
        assert (one.identity() != override(one, other).identity()) == differ
