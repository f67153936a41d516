"""Studies: paired differences, who is labelled, what is compared with what, and that nothing is computed twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jobs import study
from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.evaluate import predictions
from kmtr.evaluate.predictions import HeldOut
from kmtr.evaluate.scores import Result, difference
from kmtr.exported import export_encoder
from kmtr.model.encoder import line_encoder
from kmtr.studies import ablation, comparison, labels
from kmtr.studies.comparison import Cohort, Source
from kmtr.studies.variants import GROUPS, Group, asked, check
from kmtr.train import driver
from kmtr.types import InputError

TRUTH = np.random.default_rng(0).normal(size=(200, 2)) * (10.0, 3.0) + (150.0, 60.0)


def result(error: float, seed: int = 0, accelerations: int = 2) -> Result:
    noise = np.random.default_rng(seed).normal(size=(accelerations, *TRUTH.shape)) * (10.0, 3.0)
    return Result(TRUTH + error * noise, TRUTH.mean(0))


def test_a_paired_difference_is_the_difference_of_r2_within_its_interval() -> None:
    good, bad = result(0.5), result(0.9)
    gain = difference([good], [bad], TRUTH, 500)
    expected = float((good.r2(TRUTH) - bad.r2(TRUTH)).mean())
    assert gain.value == pytest.approx(expected, rel=1e-9)
    assert gain.subjects[0] < expected < gain.subjects[1]
    assert gain.both == gain.subjects  # one seed: there is no other to draw
    assert gain.each == (gain.value,)


def test_pairing_by_subject_leaves_no_spread_where_methods_agree() -> None:
    gain = difference([result(0.7)], [result(0.7)], TRUTH, 100)
    assert (gain.value, *gain.subjects) == (0.0, 0.0, 0.0)


def test_intervals_over_seeds_hold_what_seeds_differ_by() -> None:
    many, other = [result(0.3, 1), result(0.9, 2), result(0.5, 3)], [result(1.0, seed) for seed in range(3)]
    gain = difference(many, other, TRUTH, 500)
    assert gain.value == pytest.approx(np.mean(gain.each))
    assert gain.both[0] < gain.subjects[0] < gain.subjects[1] < gain.both[1]
    with pytest.raises(ValueError, match="as many results"):
        difference(many, other[:2], TRUTH, 10)


def test_unknown_labels_of_held_out_subjects_count_nothing() -> None:
    truth = TRUTH.copy()
    truth[::3, 0] = np.nan
    known = np.isfinite(truth[:, 0])
    good, bad = result(0.5), result(0.9)
    some = [Result(r.predicted[:, known], r.mean) for r in (good, bad)]
    np.testing.assert_allclose(good.r2(truth)[:, 0], some[0].r2(TRUTH[known])[:, 0])
    gain = difference([good], [bad], truth, 50, accelerations=[1], targets=[0])
    assert gain.value == pytest.approx(some[0].r2(TRUTH[known])[1, 0] - some[1].r2(TRUTH[known])[1, 0])


def test_a_target_without_labels_is_left_out_of_the_mean() -> None:
    good, bad = (Result(r.predicted, np.array([r.mean[0], np.nan])) for r in (result(0.5), result(0.9)))
    assert np.isnan(good.r2(TRUTH)[:, 1]).all()
    gain = difference([good], [bad], TRUTH, 50)
    assert gain.value == pytest.approx(float((good.r2(TRUTH) - bad.r2(TRUTH))[:, 0].mean()))


# -------------------------------------------------------------------------------------------------------------- cohort


@pytest.fixture
def config(small: RunConfig) -> RunConfig:
    return override(
        small,
        {
            "study.seeds": (0, 1),
            "study.labels": (6, 500),
            "study.ablation_labels": (12,),
            "study.targets": ("lvedv_ml", "lvef_pct"),
            "study.steps": 1,
            "study.scratch_steps": 1,
            "study.copies": 2,
            "evaluate.accelerations": (2, 4),
            "evaluate.bootstrap": 20,
        },
    )


@pytest.fixture
def cohort(config: RunConfig, tmp_path: Path) -> Cohort:
    return comparison.cohort(config, Dataset.open(config.data), tmp_path, config.study.labels)


def test_budgets_are_nested_bounded_and_drawn_by_the_seed(cohort: Cohort) -> None:
    assert cohort.budgets == (6, 24)  # the dataset has 24 training subjects
    assert sorted(cohort.labelled[0]) == list(range(24))
    assert cohort.labelled[0] != cohort.labelled[1]
    assert len(cohort.rows) == 12
    assert np.isfinite(cohort.truth).all()


def test_a_study_needs_a_target_that_the_dataset_has(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dataset, "labels", property(lambda self: {"lvm_g": 24}))
    with pytest.raises(InputError, match="got lvedv_ml, lvef_pct; it has lvm_g"):
        comparison.cohort(config, Dataset.open(config.data), tmp_path, (6,))


def test_everything_is_computed_once(
    cohort: Cohort, tables: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All methods but pretraining itself, with tasks run here; the second time there is nothing left to do."""
    encoders = {}
    for method in ("masked", "longer", "aligned"):
        for seed in cohort.labelled:
            folder = tmp_path / f"{method}-{seed}"
            module = line_encoder(cohort.config.data, cohort.config.model)
            weights = {name: p.detach().clone() for name, p in module.state_dict().items()}
            export_encoder(folder, cohort.config, weights, tables)
            encoders[seed, method] = str(folder)
    del encoders[1, "aligned"]  # the guard stopped it
    called: list[str] = []

    def here(function, jobs, what, device):
        for job in jobs:
            called.append(what)
            function(*job)

    monkeypatch.setattr(comparison, "each", here)
    for _ in range(2):
        comparison.probe_all(cohort, labels.sources(cohort, encoders, 10))
        here(comparison.write_trained, labels.trainings(cohort, encoders), "trainings", "cpu")
    budgets, accelerations = len(cohort.budgets), len(cohort.accelerations)
    # Baselines are shared by the seeds; augmented copies are made for each budget.
    assert called.count("study: features") == ((2 + 2 + 2 + 2 + 1) + (1 + 2 + 2 + 1) * budgets) * accelerations
    assert called.count("study: probes") == 2 * 2 + 2 * 2 + 2 + 1 + (2 + 2 + 2 + 1)
    assert called.count("trainings") == (2 + 2 + 1) * budgets

    results = labels.collect(cohort, encoders, 10)
    kept = predictions.read(tmp_path / "predictions.parquet").to_pylist()
    assert {row["subject"] for row in kept} == set(cohort.held_out.subjects)
    assert {(row["seed"], row["labels"]) for row in kept} == {(s, b) for s in cohort.labelled for b in cohort.budgets}
    assert {row["system"] for row in kept} == {m if m != "longer" else "longer10" for m in labels.TITLES}
    assert {row["true_acceleration"] for row in kept if row["system"] == "masked-tuned"} == {2.0, 4.0}
    assert set(results) == {(method, budget) for method in labels.TITLES for budget in cohort.budgets}
    for budget in cohort.budgets:
        np.testing.assert_array_equal(results["mean", budget][0].r2(cohort.truth), 0.0)
        same = [results[method, budget][1].predicted for method in ("masked", "aligned")]
        np.testing.assert_array_equal(*same)  # where the guard stopped alignment
    compared = labels.differences(cohort, results)
    assert {one["R"] for one in compared} == {2, 4, "all"}
    assert {(one["a"], one["b"], one["target"]) for one in compared} >= {
        ("aligned", "longer", "mean"),
        ("aligned", "masked", "lvef"),
    }
    scores = {key: comparison.scores(found, cohort) for key, found in results.items()}
    assert len(labels.mean_table(cohort, scores, "", 10).rows) == accelerations * len(labels.TITLES)


def test_augmented_copies_are_other_views_of_the_same_subjects(cohort: Cohort) -> None:
    plain, augmented = Source("lowres", seeds=(0,)), Source("lowres", seeds=(0,), augmented=True)
    assert plain.path(cohort, 4, 24) != augmented.path(cohort, 4, 24)
    found = []
    for source in (plain, augmented):
        comparison.write_features(cohort, source, 4, 24)
        with np.load(source.path(cohort, 4, 24)) as file:
            found.append(dict(file))
    (rows, as_they_are), copies = found[0]["train"].shape[:2], found[1]["train"]
    assert (as_they_are, copies.shape[:2]) == (1, (rows, 1 + cohort.config.study.copies))
    np.testing.assert_array_equal(copies[:, :1], found[0]["train"])
    np.testing.assert_array_equal(found[1]["test"], found[0]["test"])
    centred = (copies - copies.mean((0, 1))).reshape(rows, -1, copies.shape[2])
    unit = centred / np.linalg.norm(centred, axis=2, keepdims=True)
    alike = np.einsum("acf,bdf->abcd", unit, unit).mean((2, 3))
    assert (alike.argmax(1) == np.arange(rows)).mean() > 0.8, "a copy resembles its own subject most"
    assert np.abs(np.diff(copies, axis=1)).max(2).min() > 0, "no two copies are the same"


def test_the_first_step_of_fine_tuning_goes_where_the_ridge_probe_points(
    cohort: Cohort, tables: dict, tmp_path: Path
) -> None:
    """From a head of zeros, at a rate that leaves the encoder as it is."""
    config = override(
        cohort.config,
        {
            "sampling.accelerations": (4,),
            "evaluate.accelerations": (4,),
            "study.steps": 1,
            "study.learning_rate": 1e-12,
        },
    )
    some = comparison.cohort(config, Dataset.open(config.data), tmp_path, (12,))
    module = line_encoder(config.data, config.model)
    export_encoder(tmp_path / "e", config, {k: p.detach().clone() for k, p in module.state_dict().items()}, tables)
    comparison.write_trained(some, str(tmp_path / "e"), "masked-tuned", 0, 12, False)
    source = Source("masked-0", str(tmp_path / "e"), seeds=(0,))
    comparison.write_features(some, source, 4, 12)
    comparison.write_probes(some, source, "masked", 0)
    comparison.write_mean(some, 0, 12)
    results = comparison.gather(some, [("masked-tuned", 0, 12), ("masked", 0, 12)])
    tuned, probed = results["masked-tuned", 0, 12], results["masked", 0, 12]
    # The probe is fitted on validation's patterns and the head on training's: alike, not equal.
    assert np.corrcoef(tuned.predicted[0, :, 0], probed.predicted[0, :, 0])[0, 1] > 0.5


# ------------------------------------------------------------------------------------------------------------ ablation


def test_variants_resolve_and_the_recipes_own_choice_is_no_run_of_its_own(config: RunConfig) -> None:
    dataset = Dataset.open(config.data)
    check(GROUPS, config)
    variants = ablation.variants_of(config, GROUPS)
    assert not any(v.failure for v in variants)
    names = {(v.group, v.name): driver.run_folder(v.config, dataset)[0] for v in variants}
    default = names[ablation.NOISE, "seed 0"]
    assert names["normalisation", "power 0.5"] == names["k-space loss", "mse"] == names["mask ratio", "0.5"] == default
    # The recipe's own choice stands in seven groups of masked pretraining beside seed 0, and three times in those of
    # alignment.
    assert len(set(names.values())) == len(names) - 7 - 2


def test_a_misspelt_key_fails_loudly_and_an_impossible_variant_is_a_row(config: RunConfig) -> None:
    with pytest.raises(InputError, match=r"group 'g', variant 'v': unknown key 'model\.widht'"):
        check((Group("g", "?", {"v": {"model.widht": 1}}),), config)
    impossible = Group("g", "?", {"odd": {"model.head_width": 7}})
    failed = ablation.variants_of(config, (impossible,))[-1]
    assert failed.failure.startswith("model.")
    nobody = Cohort(config, Path(), (), {}, [], {}, HeldOut((), (), np.zeros((0, 0))))
    row = ablation.score(nobody, {}, failed, 12)
    assert row["failure"] == failed.failure
    assert "r2" not in row


def test_commands_refuse_with_one_line() -> None:
    with pytest.raises(InputError, match="one of labels, ablation, tasks, systems, got 'label'"):
        study.run(["label"])
    with pytest.raises(InputError, match=r"run\.fresh"):
        study.run(["labels", "run.fresh=true"])
    with pytest.raises(InputError, match=r"study\.labels: expected one or more different integers from 3"):
        study.run(["labels", "tiny", "study.labels=100,100"])


def test_only_the_groups_that_are_asked_for_are_run(config: RunConfig) -> None:
    assert asked(config) == GROUPS
    some = override(config, {"study.groups": "target,mask ratio"})
    assert [group.name for group in asked(some)] == ["target", "mask ratio"]
    with pytest.raises(InputError, match=r"study\.groups: expected some of .*mask ratio.*, got 'maskratio'"):
        asked(override(config, {"study.groups": "maskratio"}))
