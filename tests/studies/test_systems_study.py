"""The study of systems: every contender is trained and scored, for equal seconds, and rows alone make the report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import command
import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import study
from kmtr.config import RunConfig, from_json, override
from kmtr.data.dataset import record
from kmtr.data.dataset.reader import Dataset
from kmtr.evaluate.task_tables import MEAN_DICE
from kmtr.report.intervals import Interval
from kmtr.simulation.labels import risk
from kmtr.studies import aims, metric_tables, pictures, system_figures, system_report, task_measures, task_rows, tasks
from kmtr.studies.contenders import CONTENDERS, decided
from kmtr.studies.paired import Drawn
from kmtr.studies.systems import order
from kmtr.studies.task_measures import AREAS, headline
from kmtr.studies.task_rows import FLOORS, PRETRAINED, Asked, Rows
from kmtr.studies.task_study import Study, bound_settings, held_out, settings
from kmtr.tracking.spool import Spool
from kmtr.train import driver
from kmtr.train.folder import SPEED as SPEED_WALL
from kmtr.train.folder import SPEED_CPU, Outcome
from kmtr.types import InputError

SMALL = {
    "train.workers": 1,
    "train.eval_every": 2,
    "train.log_every": 1,
    "masked.steps": 2,
    "align.steps": 3,
    "align.head_steps": 1,
    "study.seeds": (0,),
    "study.systems": (PRETRAINED, "unet-shared", "unet-full", "lowrank-unet"),
    "study.bound_steps": 12,
    "study.bound_patience": 1,
    "task.tasks": ("phenotypes", "segmentation"),
    "task.targets": ("lvedv_ml", "lvef_pct"),
    "task.steps": 4,
    "task.frames": 1,
    "task.unet_width": 4,
    "evaluate.accelerations": (2, 4),
    "evaluate.bootstrap": 50,
}
BOTH = ("phenotypes", "segmentation")
SPEED = 16.0
"""Subjects/s of k-MTR; its opponents are twice as fast."""


@pytest.fixture
def config(small: RunConfig, tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(tasks, "TRIAL", 4)
    monkeypatch.setattr(tasks, "TRIAL_EVERY", 2)
    return override(small, SMALL | {"storage.root": str(tmp_path / "runs"), "study.rows": str(tmp_path / "rows")})


def speed(outcome: Outcome, *_: object) -> float:
    """Subjects/s: the opponents' twice those of k-MTR."""
    own = from_json((Path(outcome.folder) / "config.json").read_text())
    ours = (own.task.system, own.model.encoder_inputs) == ("kspace", "kspace")
    return SPEED if ours or own.stage != "task" else 2 * SPEED


def asked_for(config: RunConfig) -> dict[str, Any]:
    """What the command answers."""
    return study.run(["systems", *command.words(config)])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / task_rows.FILE).read_text().splitlines()]


EVERY = (
    *(
        PRETRAINED,
        "tokens-zerofilled",
        "unet-shared",
        "unet-lowrank",
        "unet-full",
        "resnet50-shared",
        "kmae",
        "image-full",
    ),
    "lowrank-unet",
)
BOUNDS = {"unet-full", "image-full"}


@pytest.mark.slow
@pytest.mark.parametrize("names", [SMALL["study.systems"], pytest.param(EVERY, marks=pytest.mark.full)])
def test_contenders_are_trained_for_equal_seconds_and_rows_alone_make_the_report(
    names: tuple[str, ...], config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(config, {"study.systems": names})
    pytest.importorskip("monai", reason="needs MONAI (the extra baselines)")
    monkeypatch.setattr(tasks, "rate", speed)
    said = asked_for(config)
    assert (said["rows"], said["missing"]) == (len(names), 0)
    rows = {row["start"]: row for row in lines(tmp_path / "rows")}
    assert list(rows) == [PRETRAINED, FLOORS, *config.study.systems[1:]]
    learns = {PRETRAINED: BOTH, "tokens-zerofilled": BOTH, "image-full": BOTH}
    learns |= dict.fromkeys(("resnet50-shared", "kmae"), ("phenotypes",))
    assert [tuple(rows[name]["tasks"]) for name in names] == [learns.get(name, ("segmentation",)) for name in names]
    titles = {name: list(rows[name]["R"]["4"]["measures"]) for name in config.study.systems}
    assert titles["unet-shared"] == ["U-Net on temporally shared image"]
    if "tokens-zerofilled" in names:
        assert titles["tokens-zerofilled"] == ["k-MTR fine-tuned on zero-filled patches"]
        assert rows["tokens-zerofilled"]["pretraining_s"] > 0
        assert rows["image-full"]["pretraining_s"] > 0
    assert "pretraining_s" not in rows["unet-shared"]
    assert isinstance(rows["unet-full"]["converged"], bool)
    assert rows[PRETRAINED]["training_s"] == 4 * 8 / SPEED
    assert titles["lowrank-unet"] == ["U-Net on low-rank + sparse image"]
    assert rows["lowrank-unet"]["run"] == rows["unet-full"]["run"], "nothing is trained for it"
    for name in {*names} - {PRETRAINED, *BOUNDS, "lowrank-unet"}:
        assert rows[name]["steps"] == 8, "twice as fast, so twice as many"
        assert rows[name]["training_s"] == rows[PRETRAINED]["training_s"]

    found = json.loads(Path(said["results"]).read_text())
    scores = found["scores"]
    assert {"dice/unet-shared", "dice/floors", "r2/pretrained", "r2/floors"} <= set(scores)
    for r in ("2", "4"):  # a bound sees the same whatever R is
        assert scores["dice/unet-full"][r] == scores["dice/unet-full"]["2"]
    folder = Path(said["report"]).parent
    assert {path.name for path in folder.glob("*.png")} == {
        *("figure.png", "agreement.png", "embedding.png"),
        *(f"masks-{number}.png" for number in (1, 2, 3)),
    }
    report = (folder / "report.html").read_text()
    assert report.count("<figure>") == len([*folder.glob("*.png")])
    assert "Plotly" in (folder / system_figures.INTERACTIVE).read_text()
    names_of_subjects = held_out(config, Dataset.open(config.data))[0].subjects
    assert not [name for name in names_of_subjects if name in report]

    pairs = {(one["measure"], one["b"]) for one in found["differences"]}
    assert {pair for pair in pairs if pair[0] != "masks_lvef_r2"} == {
        *((measure, FLOORS) for measure in ("r2", "dice", "areas_lvef_r2", "areas_r2")),
        *(("r2", name) for name in names[1:] if "unet" not in name),
        *(
            (measure, name)
            for measure in ("dice", "areas_lvef_r2", "areas_r2")
            for name in names[1:]
            if name != "kmae" and not name.startswith("resnet50")
        ),
    }

    known = [(row["start"], row["digest"]) for row in lines(tmp_path / "rows")]
    other = order(override(config, {"study.bound_steps": 14}))
    wanted = Rows(tmp_path / "rows", known[0][1], config.evaluate.accelerations, (), {"steps": 14}, decided).read()
    assert [one.start for one in other if one not in wanted] == ["unet-full", "lowrank-unet"], (
        "a bound of other settings is not done"
    )

    monkeypatch.setattr(driver, "fit", lambda *_, **__: pytest.fail("all rows are there"))
    again = asked_for(override(config, {"storage.root": str(tmp_path / "elsewhere")}))
    assert json.loads(Path(again["results"]).read_text()) == found
    for path in folder.glob("*.png"):
        assert (Path(again["report"]).parent / path.name).read_bytes() == path.read_bytes(), "rows alone make figures"
    (tmp_path / "rows" / task_rows.FILE).write_text("")
    with pytest.raises(InputError, match=r"study\.train: expected rows to report"):
        asked_for(override(config, {"study.train": False}))


def test_a_bound_learns_at_one_rate_until_validation_ends_it_and_others_are_annealed(config: RunConfig) -> None:
    bound, other = (
        settings(config, Asked(0, name, ("segmentation",), 0), "none") for name in ("unet-full", "unet-shared")
    )
    assert (bound.optimizer.schedule, bound.optimizer.ema, bound.task.patience) == ("plateau", 0.99, 1)
    assert (other.optimizer.schedule, other.optimizer.ema, other.task.patience) == ("cosine", 0.0, 0)
    assert bound_settings(config)["optimizer.schedule"] == "plateau", "bounds of another schedule are made anew"


def test_rows_of_a_study_are_those_that_learn_its_tasks(config: RunConfig) -> None:
    numbers = order(override(config, {"study.systems": (), "task.tasks": ("phenotypes",), "study.seeds": (0, 1)}))
    assert [(one.seed, one.start) for one in numbers] == [
        (seed, name)
        for seed in (0, 1)
        for name in CONTENDERS
        if {*name.split("-")}.isdisjoint(("unet", "linet", "xf", "kgin"))
        if seed == 0 or name not in ("scratch-long", "kmae", "lowrank-resnet50")
    ]
    for asked, line in (
        ("unet-shared", f"study.systems: expected {PRETRAINED} among them"),
        ("pretrained,nnunet", "study.systems: expected some of .*, got nnunet"),
        ("pretrained,xf-unet,unet-full", "study.systems: expected xf among them, whose model xf-unet takes"),
        ("pretrained,lowrank-unet", "study.systems: expected unet-full among them, whose model lowrank-unet takes"),
        ("pretrained,image-full", "study.systems: image-full cannot be trained: masked.steps, align.steps, .*expected"),
    ):
        with pytest.raises(InputError, match="^" + line):
            asked_for(override(config, {"study.systems": tuple(asked.split(",")), "masked.steps": 0}))


def test_no_two_contenders_of_a_task_look_alike_in_figures(config: RunConfig) -> None:
    shown = [(task, one.style) for one in CONTENDERS.values() for task in (one.tasks or ("phenotypes", "segmentation"))]
    assert len(shown) == len({*shown})


def test_from_scratch_for_pretraining_s_seconds_too(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the same speed a second of pretraining is a second of training; one of them pretrains, the other waits."""
    dataset = Dataset.open(config.data)
    truth, places = held_out(config, dataset)
    one = Study(config, dataset, truth, Rows(tmp_path / "made", "0" * 8, (2, 4), places), "")
    monkeypatch.setattr(tasks, "fit", lambda *_: Outcome("", "", "", "", {}))
    monkeypatch.setattr(tasks, "rate", lambda *_: SPEED)
    long, own = Asked(0, "scratch-long", BOTH, 0), Asked(0, PRETRAINED, BOTH, 0)
    assert tasks.equal_steps(one, long, "none") == config.task.steps + config.total_steps
    assert tasks.equal_steps(one, long._replace(start="unet-shared"), "none") == config.task.steps
    assert tasks.needs(one, long).makes > tasks.needs(one, own).makes != frozenset()
    assert tasks.needs(one, own._replace(start=FLOORS)).after == {own}


def test_speeds_are_compared_by_the_processor_s_time_where_all_have_it(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that was twice as busy while the second of two equal networks was measured."""
    dataset = Dataset.open(config.data)
    one = Study(config, dataset, held_out(config, dataset)[0], Rows(tmp_path / "made", "0" * 8, (2, 4), ()), "")
    folders: dict[str, Path] = {}

    def fit(own: RunConfig, *_: object) -> Outcome:
        return Outcome("", "", str(folders[own.task.system]), "", {})

    def logged(name: str, values: dict[str, float]) -> Path:
        spool = Spool(tmp_path / name / "spool", "", "0" * 32, ships=False)
        for step in (2, 4):
            spool.metrics(step, values)
        spool.close()
        return tmp_path / name

    monkeypatch.setattr(tasks, "fit", fit)
    asked = Asked(0, "unet-shared", ("segmentation",), 0)
    folders |= {"kspace": logged("ours", {SPEED_WALL: 10.0, SPEED_CPU: 12.0})}
    folders |= {"unet": logged("busy", {SPEED_WALL: 5.0, SPEED_CPU: 12.0})}
    assert tasks.equal_steps(one, asked, "none") == config.task.steps
    folders |= {"unet": logged("before", {SPEED_WALL: 5.0})}
    assert tasks.equal_steps(one, asked, "none") == config.task.steps // 2, "by the clock, as of before 2026-12"


def test_making_the_image_that_a_network_sees_costs_it_no_steps(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset.open(config.data)
    one = Study(config, dataset, held_out(config, dataset)[0], Rows(tmp_path / "made", "0" * 8, (2, 4), ()), "")
    measured: list[tuple[str, str]] = []

    def fit(own: RunConfig, *_: object) -> Outcome:
        measured.append((own.task.system, own.task.input))
        return Outcome("", "", "", "", {})

    monkeypatch.setattr(tasks, "fit", fit)
    monkeypatch.setattr(tasks, "rate", lambda *_: SPEED)
    shared, lowrank = (Asked(0, name, ("segmentation",), 0) for name in ("unet-shared", "unet-lowrank"))
    steps = [tasks.equal_steps(one, asked, "none") for asked in (shared, lowrank)]
    assert steps[0] == steps[1]
    assert measured[:2] == measured[2:] == [("kspace", ""), ("unet", "shared")]
    assert tasks.needs(one, shared).makes == tasks.needs(one, lowrank).makes, "one of them measures, the other waits"
    assert one.settings(lowrank, "none").task.input == "lowrank"


def test_short_runs_of_speed_are_no_longer_than_training(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TRIAL", 60)
    monkeypatch.setattr(tasks, "TRIAL_EVERY", 10)
    assert [tasks.trial_steps(override(config, {"task.steps": steps})) for steps in (3000, 40, 1)] == [60, 40, 20]


@pytest.fixture
def made(config: RunConfig, tmp_path: Path) -> Study:
    """A study of rows that a test makes up: two seeds, masks of k-MTR, an opponent and a bound."""
    own = override(config, {"study.seeds": (0, 1), "task.tasks": ("segmentation",)})
    dataset = Dataset.open(own.data)
    truth, places = held_out(own, dataset)
    one = Study(own, dataset, truth, Rows(tmp_path / "made", "0" * 8, own.evaluate.accelerations, places), "")
    rng, shape = np.random.default_rng(0), (len(own.evaluate.accelerations), len(places))
    base = rng.uniform(0.4, 0.6, shape)
    for seed in (0, 1):
        for name, more, extra in (
            (PRETRAINED, 0.1, {}),
            ("unet-shared", 0.0, {}),
            ("unet-full", 0.2, {"converged": seed == 0}),
        ):
            values = {name: base + more + rng.normal(0, 0.01, shape) for name in MEAN_DICE}
            means = one.means(seed, 0)
            by_r = {
                str(r): {"true_R": r, "measures": {name: headline(own, values, truth, means, i)}, "metrics": {}}
                for i, r in enumerate(own.evaluate.accelerations)
            }
            about = {"R": by_r, "subjects": 12, "data": "", "parameters": 1, "training_s": 1.0, "device": "cpu"}
            one.rows.add(Asked(seed, name, ("segmentation",), 0), about | extra, values)
    return one


def test_who_wins_does_so_beyond_the_interval_and_no_share_is_taken_of_an_unfinished_bound(made: Study) -> None:
    rows = made.rows.read()
    compared = {(one["b"], one["R"]): one for one in system_report.differences(made, rows)}
    over = compared["unet-shared", "mean"]
    assert over["difference"] == pytest.approx(0.1, abs=0.02)
    assert over["interval"][0] > 0
    assert over["seeds"] == [0, 1]
    table = system_report.difference_table([*compared.values()])
    wins = {(str(row[1]), str(row[2])): row[-1] for row in table.rows}
    assert wins[CONTENDERS["unet-shared"].title, "mean"] == "k-MTR"
    assert wins[CONTENDERS["unet-full"].title, "mean"] == CONTENDERS["unet-full"].title
    assert {row for row, _ in table.strong} == {i for i, row in enumerate(table.rows) if row[-1] != "tie"}
    doubtful = [one | {"p_holm": 0.2} if one["R"] == "mean" else one for one in compared.values()]
    after = {row[2]: row[-1] for row in system_report.difference_table(doubtful).rows}
    assert after["mean"] == "tie", "beyond the interval, but not after Holm's correction"
    drawn = Drawn(made, 100)
    (unfinished,) = aims.bound_table(made, rows, drawn).rows
    assert unfinished[2:] == ("not converged", "not converged")
    told = {one: row | ({"converged": True} if "converged" in row else {}) for one, row in rows.items()}
    (share,) = aims.bound_table(made, told, drawn).rows
    for value in share[2:]:
        assert isinstance(value, Interval)
        assert value.low < value.value < value.high
        assert value.value == pytest.approx(100 * 0.6 / 0.7, abs=3)
    assert "not who wins" in system_report.summary_of(made, rows, 6, [])


def test_aims_are_met_missed_tied_or_open(made: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aims, "BOUND_R", 2)
    monkeypatch.setattr(aims, "FAR_R", 4)
    rows, drawn = made.rows.read(), Drawn(made, 100)
    told = {one: row | ({"converged": True} if "converged" in row else {}) for one, row in rows.items()}
    compared = system_report.differences(made, rows)

    def verdicts(some: dict[Asked, Any], differences: list[dict[str, Any]]) -> dict[str, Any]:
        return {str(row[0]): row[-1] for row in aims.aims_table(made, some, drawn, differences).rows}

    bound, opponent = f"95% of the strongest bound: {CONTENDERS['unet-full'].title}", CONTENDERS["unet-shared"].title
    found = verdicts(told, compared)
    assert found[bound] == "missed", "86 % of it"
    assert found["90% of its own at R = 2"] == "met"
    assert found[f"beaten at equal seconds: {opponent}"] == "met"
    assert found[f"at least tied at equal seconds: {CONTENDERS['tokens-zerofilled'].title}"] == "open: no row"
    assert verdicts(rows, compared)[bound] == "open: it has not converged"
    without = {one: row for one, row in told.items() if one.start != "unet-full"}
    assert verdicts(without, compared)["95% of the strongest bound"] == "open: no row of a bound"
    weaker = Asked(0, "image-full", ("segmentation",), 0), Asked(1, "image-full", ("segmentation",), 0)
    ours = [one for one in rows if one.start == PRETRAINED]
    both = rows | {one: told[other] | {"converged": True} for one, other in zip(weaker, ours, strict=True)}
    for one, other in zip(weaker, ours, strict=True):
        made.rows.add(one, both[one], made.rows.values(other))
    assert verdicts(both, compared)[bound] == "open: it has not converged", "whatever a weaker one has"
    doubtful = [one | {"p_holm": 0.2} for one in compared]
    assert verdicts(told, doubtful)[f"beaten at equal seconds: {opponent}"] == "tie"


@pytest.mark.parametrize(
    ("number", "tie", "said"),
    [
        ((0.2, 0.1, 0.3), False, "met"),
        ((0.2, -0.1, 0.3), False, "met, within the interval"),
        ((-0.1, -0.2, 0.1), False, "missed, within the interval"),
        ((-0.2, -0.3, -0.1), False, "missed"),
        ((0.2, 0.1, 0.3), True, "met"),
        ((-0.1, -0.2, 0.1), True, "tie"),
        ((-0.2, -0.3, -0.1), True, "missed"),
        ((math.nan, math.nan, math.nan), False, "not defined"),
    ],
)
def test_verdicts(number: tuple[float, float, float], tie: bool, said: str) -> None:
    assert aims.verdict(aims.Aim("", "dice", "8", Interval(*number), 0.0, tie)) == said


def test_a_model_whose_row_came_from_elsewhere_is_trained_anew_by_one_row_with_as_many_steps(
    made: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    xf, bound = Asked(0, "xf", ("reconstruction",), 0), Asked(0, "unet-full", ("segmentation",), 0)
    both = [bound._replace(start=name) for name in ("xf-unet", "lowrank-unet")]
    assert tasks.needs(made, both[0]).after == {xf, bound}
    made.rows.add(xf, {"steps": 17}, {})
    monkeypatch.setattr(tasks, "fit", lambda *_: pytest.fail("no speed is measured anew"))
    assert tasks.equal_steps(made, xf, "none") == 17
    assert made.settings(xf, "none", tasks.known_steps(made, xf) or 0).total_steps == 17
    trains = [tasks.needs(made, one).makes for one in both]
    assert trains[0] & trains[1] == {f"model of {bound.title}"}
    assert f"model of {xf.title}" in trains[0]
    monkeypatch.setattr(tasks, "finished", lambda *_: Outcome("", "", "", "", {}))
    assert not tasks.needs(made, both[0]).makes, "both are here"


def test_correlations_are_those_of_the_values_that_rows_keep(made: Study) -> None:
    told = override(made.config, {"task.tasks": ("phenotypes", "segmentation")})
    study = replace(made, config=told)
    target = told.task.targets[0]
    truth = study.truth.values[target]
    known, rs = np.isfinite(truth), told.evaluate.accelerations
    noise = np.random.default_rng(0).normal(0, np.nanstd(truth), (len(rs), len(truth)))
    asked, values = Asked(0, "scratch", ("phenotypes",), 0), truth + noise
    study.rows.add(
        asked, {"R": {}}, {target: values, AREAS + target: np.where(known, truth, np.nan)[None].repeat(2, 0)}
    )
    table = metric_tables.correlations(study, {asked: {}})
    title = CONTENDERS["scratch"].title
    assert [row[:2] for row in table.rows] == [(title + by, str(r)) for by in ("", ", areas of masks") for r in rs]
    for row, of in zip(table.rows, [*values, truth, truth], strict=True):
        assert isinstance(row[2], Interval)
        assert row[2].value == pytest.approx(np.corrcoef(truth[known], of[known])[0, 1], abs=1e-3)  # kept in few digits


def test_all_metrics_of_rows_are_tables_with_what_a_system_answers_by() -> None:
    def said(*values: float | None) -> dict[str, Any]:
        return {"mae": {"lvef_pct": [*values]}, "r2": {"lvef_pct": [0.5, 0.4, 0.6]}}

    head, areas = "k-MTR fine-tuned", "k-MTR fine-tuned, areas of masks"
    rows: dict[Asked, Any] = {
        Asked(seed, PRETRAINED, BOTH, 0): {
            "R": {"4": {"metrics": {head: said(4.0 + seed, 3.0, 5.0), areas: said(2, 1, 3)}}}
        }
        for seed in (0, 1)
    }
    rows[Asked(0, FLOORS, BOTH, 0)] = {
        "R": {"4": {"metrics": {"mean": said(6, 5, 7) | {"average_precision": {"dcm": [0.1, 0.1, 0.1]}}}}}
    }
    found = {table.name: table for table in metric_tables.told(rows, ("lvef_pct", "lvm_g"), ("dcm",))}
    assert set(found) == {"phenotypes-mae", "phenotypes-r2", "diseases-precision"}, "nothing of metrics that nobody has"
    mae = found["phenotypes-mae"]
    assert [column.name for column in mae.columns] == ["system", "R", "lvef_pct (%)", "lvm_g (g)"]
    assert [row[:3] for row in mae.rows] == [
        ("k-MTR", "4", (4.5, 3.0, 5.0)),
        ("k-MTR, areas of masks", "4", (2.0, 1.0, 3.0)),
        ("mean", "4", (6.0, 5.0, 7.0)),
    ]
    assert [row[3] for row in mae.rows] == [None] * 3
    assert mae.csv().splitlines()[1] == "k-MTR,4,4.5,3.0,5.0,"


def test_the_risk_that_diseases_were_drawn_by_is_told_beside_them(made: Study) -> None:
    from sklearn.metrics import roc_auc_score

    found = metric_tables.risks(made)
    assert set(found) == {*made.config.task.diseases} != set()
    reader = made.dataset.reader("test", made.config.data)
    studies = [record.to_study(reader.read([place])) for place in made.rows.places]
    for disease, area in found.items():
        truth = np.array([study.labels[disease] for study in studies])
        score = np.array([risk(disease, study.labels) for study in studies])
        wanted = roc_auc_score(truth, score) if len({*truth}) == 2 else math.nan
        assert area.value == pytest.approx(wanted, nan_ok=True)
    assert not all(math.isnan(area.value) for area in found.values())


def test_masks_have_failed_where_their_interval_reaches_the_mean_masks(made: Study) -> None:
    assert system_report.worthless_masks(made, made.rows.read()) == {}, "no floors keep the mean mask"
    ours = made.rows.values(Asked(0, "unet-shared", ("segmentation",), 0))
    shift = np.array([[-0.2], [0.0]])  # worse than this system at the first R, as good at the second
    mean = {f"{task_measures.MEAN}{name}": ours[name] + shift for name in MEAN_DICE}
    about = {"R": {}, "subjects": 12, "data": ""}
    made.rows.add(Asked(0, FLOORS, made.config.task.tasks, 0), about, mean)
    last = made.config.evaluate.accelerations[-1]
    found = system_report.worthless_masks(made, made.rows.read())
    assert found == {"unet-shared": [last]}
    trained = {one: row for one, row in made.rows.read().items() if one.start != FLOORS}
    scores = system_report.scores_of(made, trained, Drawn(made, 50))
    figure = system_report.figure_of(made, scores, found)
    (dice,) = [axes for axes in figure.axes if axes.get_title() == "mean Dice"]
    rings = [line for line in dice.lines if line.get_markeredgecolor() == "red" and len(line.get_xdata())]
    assert [round(float(x)) for ring in rings for x in ring.get_xdata()] == [last]


def test_subjects_are_shown_by_their_truth_alone(made: Study) -> None:
    lvef = made.truth.values[pictures.CHOSEN_BY]
    shown = pictures.chosen(made.truth)
    assert [*shown] == sorted(shown, key=lambda place: lvef[place])
    assert [who.split()[6] for who in shown.values()] == ["10th", "50th", "90th"]
    unknown = pictures.chosen(replace(made.truth, values={}))
    assert len(unknown) == 3
    assert not [who for who in unknown.values() if "percentile" in who]
    few = {pictures.CHOSEN_BY: np.where(np.arange(len(lvef)) == 4, 55.0, np.nan)}
    assert [*pictures.chosen(replace(made.truth, values=few))] == [4], "each is shown once"


def test_what_a_row_shows_comes_back_and_a_damaged_file_is_named(made: Study, tmp_path: Path) -> None:
    asked = Asked(1, "unet-shared", ("segmentation",), 0)
    assert made.rows.shown(asked) == {}
    arrays = {
        "masks/1/4/sax": np.arange(8, dtype=np.uint8).reshape(2, 2, 2),
        "embedding/x": np.ones((3, 3), "f2"),
    }
    made.rows.add(asked, {"R": {}}, made.rows.values(asked), arrays)
    back = made.rows.shown(asked)
    assert {name: value.tobytes() for name, value in back.items()} == {n: v.tobytes() for n, v in arrays.items()}
    assert made.rows.values(asked).keys() == {*MEAN_DICE}
    (path,) = made.rows.folder.glob("*-shown.parquet")
    whole = pq.read_table(path)
    path.write_bytes(path.read_bytes()[:40])
    line = r"study\.rows: expected what a row shows, got other content in .*-shown\.parquet; remove"
    with pytest.raises(InputError, match=line):
        made.rows.shown(asked)
    for column, other in ((1, ["object", "float16"]), (2, [[9], [3, 3]])):
        pq.write_table(whole.set_column(column, whole.column_names[column], [other]), path)
        with pytest.raises(InputError, match=line):
            made.rows.shown(asked)


def test_thirds_of_lvef_hold_every_known_subject_once(made: Study) -> None:
    lvef = np.array([30.0, 40, 50, 55, 60, 65, np.nan])
    values = {pictures.CHOSEN_BY: lvef, "dcm": np.array([1.0, 0, 0, 0, 0, np.nan, 0]), "hcm": np.zeros(7)}
    known = replace(made, truth=replace(made.truth, subjects=tuple("abcdefg"), values=values))
    found = system_figures.groups_of(known)
    assert list(found) == [pictures.CHOSEN_BY, "dcm"], "nobody has the other disease"
    assert {group: inside.sum() for group, inside in found["dcm"].items()} == {"no dcm": 5, "dcm": 1}
    groups = found[pictures.CHOSEN_BY]
    assert np.sum([*groups.values()], axis=0).tolist() == [1, 1, 1, 1, 1, 1, 0]
    assert [float(np.mean(lvef[inside])) for inside in groups.values()] == [35.0, 52.5, 62.5]
    assert next(iter(groups)) == "LVEF 30.0 to 46.7 %"
