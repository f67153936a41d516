"""The study of tasks: killed between rows and resumed, reported from its rows alone, and its comparisons."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import command
import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import study
from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Dataset
from kmtr.evaluate.task_tables import MEAN_DICE
from kmtr.studies import task_report, task_rows, tasks
from kmtr.studies.task_measures import headline, kept
from kmtr.studies.task_rows import FLOORS, PRETRAINED, SCRATCH, Asked, Rows
from kmtr.studies.task_study import Study, held_out, order
from kmtr.train import driver
from kmtr.types import InputError, KmtrError

SMALL = {
    "train.workers": 1,
    "train.eval_every": 100,
    "masked.steps": 2,
    "align.steps": 0,
    "study.seeds": (0,),
    "study.task_labels": (12,),
    "study.single_labels": (12,),
    "task.tasks": ("phenotypes", "segmentation"),
    "task.targets": ("lvedv_ml", "lvm_g"),
    "task.steps": 2,
    "task.frames": 1,
    "evaluate.accelerations": (2, 4),
    "evaluate.bootstrap": 50,
    "evaluate.dense": 8,
}
BOTH = ("phenotypes", "segmentation")


@pytest.fixture
def config(small: RunConfig, tmp_path: Path, without_ray: None) -> RunConfig:
    rows = str(tmp_path / "rows")
    return override(small, SMALL | {"storage.root": str(tmp_path / "runs"), "study.rows": rows})


def asked_for(config: RunConfig, **changes: object) -> dict[str, Any]:
    """What the command answers."""
    return study.run(["tasks", *command.words(override(config, {f"study.{k}": v for k, v in changes.items()}))])


def lines(folder: Path) -> list[str]:
    return (folder / task_rows.FILE).read_text().splitlines()


def test_a_study_that_is_killed_goes_on_and_its_rows_alone_make_its_report(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, fit, trained = tmp_path / "rows", driver.fit, []

    def counted(own: RunConfig, **words: Any) -> Any:
        trained.append((own.stage, own.task.tasks if own.stage == "task" else (), own.task.encoder == "none"))
        if len(trained) == 4:
            raise KmtrError("killed")
        return fit(own, **words)

    monkeypatch.setattr(driver, "fit", counted)
    with pytest.raises(KmtrError, match="killed"):
        asked_for(config)
    before = lines(folder)
    assert [json.loads(line)["start"] for line in before] == [PRETRAINED, FLOORS, SCRATCH]
    partial = asked_for(config, train=False)
    assert (partial["rows"], partial["missing"]) == (2, 2)
    said = asked_for(config)
    assert said["missing"] == 0
    assert lines(folder)[: len(before)] == before
    alone = [("task", (task,), False) for task in BOTH]
    assert trained == [("both", (), False), ("task", BOTH, False), ("task", BOTH, True), alone[0], *alone]

    last = json.loads(lines(folder)[-1])
    assert last["training_s"] > 0
    assert last["pretraining_s"] > 0
    assert last["R"]["4"]["true_R"] == 4
    measured = last["R"]["4"]["measures"]["k-MTR fine-tuned"]
    assert set(measured) == {"dice", "areas_r2"}
    assert all(isinstance(value, float) for (value, *_) in measured.values()), "of those whose masks are scored"
    (kept,) = folder.glob("*-0-pretrained-phenotypes+segmentation-12.parquet")
    known = {name: int(np.isfinite(pq.read_table(kept).column(name)).sum()) for name in ("lvm_g", "dice_mean_ed")}
    assert known == {"lvm_g": 2 * 12, "dice_mean_ed": 2 * 8}
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    reader = Dataset.open(config.data).reader("test", config.data)
    for name in reader.samples(range(len(reader))).meta.column("subject_id").to_pylist():
        assert not [file for file, content in files.items() if name.encode() in content], "no subject is named"

    monkeypatch.setattr(driver, "fit", lambda *_, **__: pytest.fail("all rows are there"))
    elsewhere = asked_for(override(config, {"storage.root": str(tmp_path / "elsewhere")}))
    found = [json.loads(Path(one["results"]).read_text()) for one in (said, elsewhere)]
    assert found[0] == found[1]
    assert set(found[0]["scores"]) == {"r2", "dice", "areas_r2"}
    assert set(found[0]["scores"]["dice"]) == {"pretrained", "scratch", "alone", "floor"}
    assert {(one["a"], one["b"]) for one in found[0]["differences"]} == set(task_report.PAIRS)

    capsys.readouterr()
    with pytest.raises(InputError, match=r"study\.train: expected rows to report"):
        asked_for(override(config, {"task.steps": 3}), train=False)
    assert "holds 5 row(s) of other settings, which are left out" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- comparisons


@pytest.fixture
def made(config: RunConfig, tmp_path: Path) -> Callable[..., Study]:
    """A study of rows that a test makes up."""

    def make(**changes: object) -> Study:
        own = override(config, changes)
        dataset = Dataset.open(own.data)
        truth, places = held_out(own, dataset)
        rows = Rows(tmp_path / "made", "0" * 8, own.evaluate.accelerations, places)
        return Study(own, dataset, truth, rows, "")

    return make


def add(one: Study, asked: Asked, values: dict[str, np.ndarray]) -> None:
    """Keep a row with these values, as a training leaves it."""
    means = one.means(asked.seed, asked.labels)
    system = "k-MTR fine-tuned" if asked.start != FLOORS else "temporally shared image"
    by_r = {
        str(r): {"true_R": r, "measures": {system: headline(one.config, values, one.truth, means, i)}, "metrics": {}}
        for i, r in enumerate(one.config.evaluate.accelerations)
    }
    one.rows.add(asked, {"R": by_r, "subjects": 12, "data": ""}, values)


def test_a_paired_difference_of_scores_is_that_of_their_means_over_seeds(made: Callable[..., Study]) -> None:
    """SSIM that is higher by 1/8 in one seed and 3/8 in the other, of every subject alike."""
    changes = {"task.tasks": ("reconstruction",), "study.seeds": (0, 1), "evaluate.bootstrap": 500}
    one = made(**changes)
    low = np.tile(np.arange(len(one.truth.subjects)) / 64, (2, 1))
    for seed, gain in ((0, 1 / 8), (1, 3 / 8)):
        add(one, Asked(seed, SCRATCH, ("reconstruction",), 12), {"ssim": low})
        add(one, Asked(seed, PRETRAINED, ("reconstruction",), 12), {"ssim": low + gain})
    add(one, Asked(0, FLOORS, ("reconstruction",), 12), {"ssim": low + 1 / 4})
    found = task_report.differences(one, one.rows.read())
    assert {(each["b"], each["R"]): each["difference"] for each in found} == pytest.approx(
        {("scratch", r): 1 / 4 for r in ("mean", 2, 4)} | {("floor", r): -1 / 8 for r in ("mean", 2, 4)}
    )
    for each in found:
        assert each["interval"] == pytest.approx((each["difference"],) * 2)
        assert each["p"] == pytest.approx(2 / 501)
        assert each.get("p_holm") == (pytest.approx(4 / 501) if each["R"] == "mean" else None)
    assert found[0]["of_seeds"] == pytest.approx([1 / 8, 3 / 8])
    assert found[3]["seeds"] == [0], "the seed that both have"


def test_r2_of_rows_is_that_of_the_formula_against_the_mean_of_each_seed(made: Callable[..., Study]) -> None:
    one = made(**{"task.tasks": ("phenotypes",), "task.targets": ("lvm_g",), "study.seeds": (0, 1)})
    truth = one.truth.values["lvm_g"]
    values = {seed: np.float16(truth + error).astype(float) for seed, error in ((0, 8.0), (1, -4.0), (2, 2.0))}
    for seed in (0, 1):
        add(one, Asked(seed, PRETRAINED, ("phenotypes",), 12), {"lvm_g": np.tile(values[seed], (2, 1))})
        add(one, Asked(seed, SCRATCH, ("phenotypes",), 12), {"lvm_g": np.tile(values[2], (2, 1))})
    means = [one.means(seed, 12)["lvm_g"] for seed in (0, 1)]
    assert means[0] != means[1], "each seed has labelled subjects of its own"
    each = [
        (((values[2] - truth) ** 2).sum() - ((values[seed] - truth) ** 2).sum()) / ((truth - mean) ** 2).sum()
        for seed, mean in enumerate(means)
    ]
    gain = task_report.differences(one, one.rows.read())[0]
    assert gain["of_seeds"] == pytest.approx(each)
    assert gain["difference"] == pytest.approx(np.mean(each))


def test_rows_are_scored_at_other_r_by_the_models_that_there_are(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for(config, single_labels=())
    monkeypatch.setattr(driver, "_fit", None)  # what trains a run that is not finished
    other = override(config, {"evaluate.accelerations": (2, 3, 4), "study.rows": str(tmp_path / "more")})
    said = asked_for(other, single_labels=(), validated=(2, 4))
    assert (said["rows"], said["missing"]) == (2, 0)
    few, more = ([json.loads(line) for line in lines(folder)] for folder in (tmp_path / "rows", tmp_path / "more"))
    for one, two in zip(few, more, strict=True):
        assert one["digest"] != two["digest"]
        assert one.get("run") == two.get("run")
        assert list(two["R"]) == ["2", "3", "4"]
        for r in ("2", "4"):
            assert one["R"][r]["measures"] == two["R"][r]["measures"]


def test_floors_from_all_labels_are_made_once_for_all_seeds(
    made: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made(**{"task.tasks": ("reconstruction",), "study.seeds": (0, 1)})
    values = {"ssim": np.tile(np.arange(len(one.truth.subjects)) / 64, (2, 1))}
    for labels in (0, 12):
        add(one, Asked(0, FLOORS, ("reconstruction",), labels), values)
    monkeypatch.setattr(tasks, "floors", lambda *_: "made")
    asked = Asked(1, FLOORS, ("reconstruction",), 0)
    assert tasks.make(one, asked._replace(labels=12), one.rows.read()) == "made", "each seed has subjects of its own"
    found = tasks.make(one, asked, one.rows.read())
    one.rows.add(found.asked, found.said, found.values)
    rows = one.rows.read()
    assert (rows[asked]["seed"], rows[asked]["as_seed"]) == (1, 0)
    assert rows[asked]["R"] == rows[asked._replace(seed=0)]["R"]
    np.testing.assert_array_equal(one.rows.values(asked)["ssim"], values["ssim"])


def test_rows_of_a_large_study_stay_small_and_precise(made: Callable[..., Study], tmp_path: Path) -> None:
    """1,000 held-out subjects at three R: 24 rows of all tasks, 12 of floors and as much as 6 of single tasks."""
    config, rng = made().config, np.random.default_rng(0)
    rows = Rows(tmp_path / "large", "0" * 8, (4, 8, 16), tuple(range(0, 2000, 2)))
    values = {name: rng.normal(150, 30, (3, 1000)) for name in kept(config)}
    assert {"dcm", "masks_lvef_pct", *MEAN_DICE, "ssim", "psnr_db"} < set(values)
    asked = Asked(0, PRETRAINED, BOTH, 0)
    rows.add(asked, {}, values)
    assert 42 * sum(path.stat().st_size for path in rows.folder.iterdir()) < 4_000_000
    for name, found in rows.values(asked).items():
        np.testing.assert_allclose(found, values[name], rtol=1e-3)
    with pytest.raises(InputError, match="expected values of 999 held-out subjects"):
        Rows(rows.folder, rows.digest, rows.accelerations, rows.places[1:]).values(asked)
    (rows.folder / task_rows.FILE).write_text("[1")
    with pytest.raises(InputError, match=r"expected a row as JSON, got '\[1' in line 1"):
        rows.read()


def test_studies_of_several_settings_add_to_one_folder_at_a_time(tmp_path: Path) -> None:
    studies = [Rows(tmp_path, str(number) * 8, (4,), (0, 1)) for number in range(4)]
    every = [Asked(seed, PRETRAINED, BOTH, 0) for seed in range(10)]

    def add(rows: Rows) -> None:
        for asked in every:
            rows.add(asked, {}, {"lvef_pct": np.full((1, 2), float(asked.seed))})

    with ThreadPoolExecutor(len(studies)) as pool:
        list(pool.map(add, studies))
    assert [list(rows.read()) for rows in studies] == [every] * len(studies)


# ---------------------------------------------------------------------------------------------------------------- plan


def test_the_rows_that_say_most_come_first(config: RunConfig) -> None:
    changes = {"study.seeds": (0, 1), "study.task_labels": (100, 200, 1000, 0), "study.single_labels": (200, 0)}
    rows = order(override(config, changes))
    assert len(rows) == len(set(rows)) == 2 * (8 + 4)
    assert [one.seed for one in rows] == [0] * 12 + [1] * 12
    assert [(one.labels, one.start) for one in rows[:8:2]] == [(n, PRETRAINED) for n in (200, 0, 1000, 100)]
    assert [(one.labels, one.start) for one in rows[1:8:2]] == [(n, SCRATCH) for n in (200, 0, 1000, 100)]
    assert [(one.labels, one.tasks) for one in rows[8:12]] == [(n, (task,)) for n in (200, 0) for task in BOTH]


def test_what_is_left_takes_as_long_as_rows_alike_and_a_pretraining_for_each_new_seed() -> None:
    row = {"row_s": 60.0, "pretraining_s": 1000.0}
    done = {Asked(0, PRETRAINED, BOTH, 200): row, Asked(0, FLOORS, BOTH, 200): {"row_s": 1e9}}
    left = [Asked(0, SCRATCH, BOTH, 200), Asked(1, PRETRAINED, BOTH, 200), Asked(1, PRETRAINED, BOTH[:1], 200)]
    assert tasks.expected(done, left) == 3 * 60 + 1000
    assert tasks.expected(done, []) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study.task_labels": "12,25"}, r"study\.task_labels: expected at most the 24 training subjects.*got 25"),
        ({"study.task_labels": "12,2"}, r"study\.task_labels: expected at least .* got 2$"),
        ({"study.single_labels": "7"}, r"study\.single_labels: expected some of study\.task_labels=\(12,\), got 7"),
        ({"study.seeds": "0,0"}, r"study\.seeds: expected one or more different integers from 0"),
        ({"task.tasks": "phenotypes,phenotypes"}, r"task\.tasks: expected different tasks"),
        ({"task.tasks": "phenotypes,masked"}, r"task\.tasks: expected some of phenotypes, .* got masked"),
        ({"task.encoder": "none"}, r"task\.encoder: .* expected it empty, .*, got none"),
        ({"task.labels": "10"}, r"task\.labels: .* study\.task_labels says them"),
    ],
)
def test_wrong_input_is_refused_in_one_line_before_anything_is_trained(
    config: RunConfig, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    words = {word.partition("=")[0]: word.partition("=")[2] for word in command.words(config)[1:]} | changes
    with pytest.raises(InputError, match=message) as error:
        study.run(["tasks", "tiny", *(f"{key}={value}" for key, value in words.items())])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()
