"""Population based training: who is replaced by whom, going on after a kill, and children that begin as donors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import content, history, written
from forked_workers import instead_of_ray_train
from test_search_planted import NotWritten, config_of

from kmtr.config import RunConfig, override
from kmtr.train import driver
from kmtr.types import InputError
from tune import pbt, space
from tune.ledger import FAILED, FINISHED, STOPPED, Ledger, Trial
from tune.plan import Plan, begin_of, settings

RATE = "masked.learning_rate"
PBT = {
    "search.scheduler": "pbt",
    f"search.space.{RATE}": "loguniform(0.0001,0.01)",
    "search.space.masked.mask_ratio": "uniform(0.3,0.9)",
    "stage": "masked",
}


def planned(config: RunConfig, ledger: Ledger | None = None) -> Plan:
    plan = Plan(space.of(config), ledger or NotWritten(Path("nowhere"), "s"))
    plan.drawn()
    return plan


def grow(plan: Plan, segments: int = 10**6) -> Plan:
    """Train on a planted objective: a step gains the more, the nearer the rate is to .001."""
    total = plan.space.config.total_steps
    while segments and (segment := pbt.next_segment(plan)) is not None:
        segments -= 1
        until, runs = segment
        for run in runs:
            step = until or total
            before = run.reports[-1] if run.reports else (0, 0.0)
            gain = (step - before[0]) / total * np.exp(-(np.log(run.values[RATE] / 0.001) ** 2))
            reports = (*run.reports, (step, float(before[1] + gain)))
            ended = {} if until else {"status": FINISHED, "result": reports[-1][1]}
            plan.ledger.update(run.name, reports=reports, **ended)
    return plan


@pytest.fixture
def _no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted objectives have no checkpoints."""
    monkeypatch.setattr(pbt, "pin", lambda *_: True)


planted = pytest.mark.usefixtures("_no_files")


@planted
def test_members_that_fall_behind_go_on_from_those_that_lead() -> None:
    plan = grow(planned(config_of(**PBT, **{"search.trials": 8, "search.grace_steps": 300, "masked.steps": 1200})))
    assert pbt.looks(plan) == [300, 600, 900]
    runs = plan.ledger.runs
    children = [run for run in runs.values() if run.donor]
    assert [run.generation for run in children] == [1, 1, 2, 2, 3, 3]  # one of four at each look
    for child in children:
        donor = runs[child.donor]
        assert dict(child.reports)[child.begun] == dict(donor.reports)[child.begun]
        assert child.begun == 300 * child.generation
        same = [run for run in runs.values() if run.number == child.number and run.generation < child.generation]
        assert (same[-1].status, same[-1].run_id) == (STOPPED, "")  # MLflow is to be told
        assert same[-1].step == child.begun
        for key, domain in plan.space.domains.items():
            assert domain.low <= child.values[key] <= domain.high  # type: ignore[union-attr]
            ratio = child.values[key] / donor.values[key]
            assert ratio != 1 or child.values[key] in (domain.low, domain.high)  # type: ignore[union-attr]
    now = plan.members
    assert [run.number for run in now] == list(range(8))
    assert all(run.status == FINISHED and run.step == 1200 for run in now)
    assert plan.done
    assert not plan.repeats()
    taken = sum(run.step - run.begun for run in runs.values())
    assert taken == 8 * 1200  # as many steps as without


@planted
def test_a_population_ends_better_than_its_first_draws_alone() -> None:
    better = []
    for seed in range(10):
        changes = {**PBT, "search.trials": 8, "masked.steps": 1200, "seed": seed}
        best = [grow(planned(config_of(**changes, **{"search.grace_steps": g}))).ranked()[0].score for g in (100, 1200)]
        mean = [
            np.mean([r.score for r in (grow(planned(config_of(**changes, **{"search.grace_steps": g}))).members)])
            for g in (100, 1200)
        ]
        assert best[0] >= best[1] - 0.05
        better.append(mean[0] > mean[1])
    assert all(better)


@planted
def test_a_population_that_is_cut_goes_on_as_a_whole_one(tmp_path: Path) -> None:
    config = config_of(**PBT, **{"search.trials": 5, "search.grace_steps": 250, "masked.steps": 1000})
    whole = grow(planned(config))
    for segments in (1, 1, 2, 10):
        cut = grow(planned(config, Ledger(tmp_path, "s")), segments)
    assert cut.ledger.runs == whole.ledger.runs
    assert cut.done
    assert pbt.next_segment(cut) is None


def test_a_member_that_failed_is_replaced_and_one_without_a_score_never_leads() -> None:
    plan = planned(config_of(**PBT, **{"search.trials": 4, "search.grace_steps": 100, "masked.steps": 200}))
    first, *others = plan.trials
    plan.ledger.update(first.name, status=FAILED, reason="not finite")
    for run, score in zip(others, (float("nan"), 0.2, 0.3), strict=True):
        plan.ledger.update(run.name, reports=((100, score),))
    (one,) = pbt.exploits(plan, 1)
    assert (one.loser.number, one.donor.number) == (others[0].number, others[2].number) or one.loser.number == 0
    assert one.donor.number == others[2].number


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"search.space.model.depth": "grid(2,3)"}, r"search\.space\.model\.depth: expected a key that can change"),
        ({"search.space.model.width": "grid(64,128)"}, r"search\.space\.model\.width"),
        ({"search.space.masked.target": "grid(acquired,all)"}, r"search\.space\.masked\.target"),
        ({"search.space.optimizer.ema": "grid(0,0.9)"}, r"search\.space\.optimizer\.ema"),
        ({f"search.space.{RATE}": "uniform(0.001,0.002)", "search.trials": 1}, "at least 2 members"),
        (
            {f"search.space.{RATE}": "uniform(0.001,0.002)", "search.grace_steps": 100},
            r"multiple of train\.eval_every=150",
        ),
        (
            {f"search.space.{RATE}": "uniform(0.001,0.002)", "search.sampler": "tpe"},
            r"search\.sampler: expected random",
        ),
        (
            {f"search.space.{RATE}": "uniform(0.001,0.002)", "search.grace_steps": 1200},
            "less than the run's 1200 steps",
        ),
        ({"stage": "both", f"search.space.{RATE}": "uniform(0.001,0.002)"}, r"align\.guard: expected false"),
    ],
)
def test_what_can_not_change_in_flight_is_refused(changes: dict[str, object], says: str) -> None:
    config = config_of(**{"search.scheduler": "pbt", "stage": "masked", "search.grace_steps": 150, **changes})
    with pytest.raises(InputError, match=says):
        pbt.check(space.of(config))


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_child_is_its_donor_right_after_the_exploit(
    small: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """Real runs with sharded state on two workers; the searched key is the peak of the learning rate's schedule."""
    instead_of_ray_train(monkeypatch)
    changes = {"storage.root": str(tmp_path), "train.workers": 2, "train.zero_stage": stage, "train.log_every": 1}
    changes |= {"masked.steps": 8, "masked.warmup_steps": 2, "train.eval_every": 4, "train.checkpoint_every": 4}
    asked = {"search.trials": 2, "search.grace_steps": 4, f"search.space.{RATE}": "loguniform(0.0001,0.003)"}
    config, _ = driver.resolve(override(small, {"stage": "masked", "search.scheduler": "pbt", **changes, **asked}))
    plan = planned(config, Ledger(tmp_path / "s", "s"))
    while (segment := pbt.next_segment(plan)) is not None:
        until, runs = segment
        for run in runs:
            trained(plan, run, until, tmp_path)
    (child,) = (run for run in plan.ledger.runs.values() if run.donor)
    donor = plan.ledger.runs[child.donor]
    before, after = (content(begin_of(tmp_path, child)), content(written(tmp_path / child.name)[0]))
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    own, donors = (history(tmp_path / run.name, "masked/loss") for run in (child, donor))
    assert sorted(own) == [5, 6, 7, 8]
    assert own[5] == pytest.approx(donors[5], rel=1e-5)  # one state, one batch: before the first step of its own rate
    assert own[8] != donors[8]
    assert plan.done


def trained(plan: Plan, run: Trial, until: int, root: Path) -> None:
    """Train a segment, and tell the ledger as the search's desk does."""
    config = override(settings(plan.space.config, run), {"train.until": until})
    outcome = driver.fit(config, quiet=True)
    score = float(outcome.metrics["val/probe_r2"])
    ended = {"status": FINISHED, "result": score} if outcome.encoder else {}
    plan.ledger.update(run.name, reports=(*run.reports, (int(outcome.metrics["step"]), score)), **ended)
