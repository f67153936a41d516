"""Searches on planted objectives: plain functions in place of runs, so that what a search concludes can be checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kmtr.config import RunConfig, override
from kmtr.config.recipes import tiny
from tune import space, verdict
from tune.ledger import FAILED, FINISHED, RECIPE, STATE, Ledger, Trial
from tune.plan import Plan, settings
from tune.verdict import judge

TEMPERATURE, RATIO, R = "align.temperature", "masked.mask_ratio", "sampling.accelerations"
NOISE = 0.01
Objective = Callable[[Trial], float]


class NotWritten(Ledger):
    """A ledger in memory alone, for thousands of searches."""

    def write(self) -> None: ...


def config_of(**changes: object) -> RunConfig:
    return override(tiny(), {"search.trials": 12, **changes})


def searched(config: RunConfig, objective: Objective, ledger: Ledger | None = None, runs: int = 10**6) -> Plan:
    """A search of which every run is finished at once, one at a time; `runs` of them at most."""
    plan = Plan(space.of(config), ledger or NotWritten(Path("nowhere"), "s"))
    plan.drawn()
    while (run := plan.next_trial(set())) is not None and runs:
        plan.ledger.update(
            run.name, status=FINISHED, reports=((config.total_steps, objective(run)),), result=objective(run)
        )
        runs -= 1
    for run in plan.repeats() if runs else []:
        if not run.ended and runs:
            plan.ledger.update(run.name, status=FINISHED, result=objective(run))
            runs -= 1
    return plan


def noisy(mean: Callable[[Trial], float], seed: int) -> Objective:
    """The mean of a setting plus noise of its run."""

    def objective(run: Trial) -> float:
        key = [seed, run.number + 1, 0 if run.seed is None else run.seed + 1]
        return mean(run) + NOISE * float(np.random.default_rng(key).normal())

    return objective


def test_no_effect_is_called_no_effect() -> None:
    """At most 16 of 200 searches name a best setting where none is; the level is one in twenty."""
    named = sum(said.best is not None for said in map(verdict_of, range(200)))
    assert named <= 16


def verdict_of(seed: int, mean: Callable[[Trial], float] = lambda _: 0.4) -> verdict.Verdict:
    found = searched(config_of(seed=seed), noisy(mean, seed)).verdict()
    assert found is not None
    return found


def test_an_effect_of_three_noise_sds_is_found() -> None:
    """Of three accelerations one is better by 3 SDs of the noise."""

    def mean(run: Trial) -> float:
        return 0.4 + 3 * NOISE * (run.values.get(R) == (8,))

    right = 0
    for seed in range(100):
        plan = searched(config_of(seed=seed), noisy(mean, seed))
        said = plan.verdict()
        assert said is not None
        values = {trial.number: trial.values for trial in plan.trials}
        right += said.best is not None and values[said.best.number][R] == (8,)
    assert right >= 90


@pytest.mark.full
def test_intervals_hold_the_true_gain() -> None:
    """Both bounds of all comparisons of a search hold in 90 of 100 searches (95 % each)."""
    held = 0
    for seed in range(200):
        said = verdict_of(seed, lambda run: 0.4 + 2 * NOISE * (run.values.get(R) == (8,)))
        plan = searched(config_of(seed=seed), noisy(lambda run: 0.4 + 2 * NOISE * (run.values.get(R) == (8,)), seed))
        true = {trial.number: 2 * NOISE * (trial.values[R] == (8,)) for trial in plan.trials}
        held += all(one.low <= true[one.number] <= one.high for one in said.comparisons)
    assert held >= 170  # 180 expected; three SDs below


def test_the_pooled_t_test_is_the_textbooks() -> None:
    from scipy.stats import ttest_ind

    recipe, one = [0.40, 0.41, 0.39, 0.405], [0.43, 0.425, 0.44]
    said = judge(recipe, {4: one})
    assert said is not None
    low, high = ttest_ind(one, recipe).confidence_interval(0.90)  # one-sided 95 % at either end
    assert (said.comparisons[0].low, said.comparisons[0].high) == pytest.approx((low, high))
    assert said.noise_sd == pytest.approx(math.sqrt((3 * np.var(recipe, ddof=1) + 2 * np.var(one, ddof=1)) / 5))
    assert said.best is not None
    assert judge(recipe, {4: one[:1]}) is None
    assert judge(recipe[:1], {4: one}) is None


def test_what_was_chosen_is_not_what_is_compared() -> None:
    """The scores that a trial was chosen for enter nothing: without them the verdict is the same."""
    plan = searched(config_of(), noisy(lambda _: 0.4, 0))
    before = plan.verdict()
    for trial in plan.candidates():
        plan.ledger.update(trial.name, result=trial.score + 0.05)
    assert plan.verdict() == before


def test_repeats_are_of_the_best_trials_and_the_recipe_with_fresh_seeds() -> None:
    plan = searched(config_of(seed=7, **{"search.confirm": "2x3", "search.noise_seeds": 4}), noisy(lambda _: 0.4, 7))
    best = [trial.number for trial in plan.ranked()[:2]]
    runs = [run for run in plan.ledger.runs.values() if run.repeats]
    assert [(run.number, run.seed) for run in runs] == [
        *((RECIPE, seed) for seed in (8, 9, 10, 11)),
        *((number, seed) for number in best for seed in (8, 9, 10)),
    ]
    for run in runs:
        changed = settings(plan.space.config, run)
        assert (changed.seed, changed.train.eval_seed) == (run.seed, 7)  # another run, asked the same
    assert plan.done
    assert not searched(config_of(**{"search.confirm": "0x0"}), noisy(lambda _: 0.4, 0)).repeats()


def test_the_recipe_among_the_trials_is_no_candidate() -> None:
    config = config_of(**{f"search.space.{R}": "grid(4|8|12|4,8)", R: "8"})
    plan = searched(config, lambda run: 0.4 + 0.1 * (run.values.get(R, (8,)) == (8,)))
    assert plan.ranked()[0].values[R] == (8,)
    assert (8,) not in [trial.values[R] for trial in plan.candidates()]


# ----------------------------------------------------------------------------------------------------------------- TPE


def bowl(run: Trial) -> float:
    """Best at temperature .1 and mask ratio .6, with R = 8."""
    return -(
        (math.log(run.values[TEMPERATURE] / 0.1)) ** 2
        + ((run.values[RATIO] - 0.6) / 0.2) ** 2
        + 0.3 * (run.values[R] != (8,))
    )


def best_of(seed: int, sampler: str) -> float:
    changes = {"search.trials": 40, "search.sampler": sampler, "search.confirm": "0x0", "seed": seed}
    return searched(config_of(**changes), bowl).ranked()[0].score


def test_tpe_is_no_worse_than_random_at_40_trials() -> None:
    seeds = range(5)
    assert np.median([best_of(seed, "tpe") for seed in seeds]) >= np.median([best_of(seed, "random") for seed in seeds])


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_that_is_cut_goes_on_as_a_whole_one(tmp_path: Path, sampler: str) -> None:
    changes = {"search.trials": 16, "search.sampler": sampler, "search.startup": 5}
    objective = noisy(lambda run: bowl(run) if run.values else 0.0, 0)
    whole = searched(config_of(**changes), objective)
    for runs in (3, 6, 4, 100):  # killed in trials and in repeats; the last goes to the end
        cut = searched(config_of(**changes), objective, Ledger(tmp_path, "s"), runs)
    assert (tmp_path / STATE).is_file()
    assert cut.ledger.runs == whole.ledger.runs
    assert cut.verdict() == whole.verdict()
    assert cut.done
    assert cut.next_trial(set()) is None


def test_a_trial_that_was_running_keeps_its_values(tmp_path: Path) -> None:
    config = config_of(**{"search.trials": 8, "search.sampler": "tpe", "search.startup": 2})
    plan = searched(config, bowl, Ledger(tmp_path, "s"), runs=4)
    begun = plan.next_trial(set())
    assert begun is not None
    again = Plan(space.of(config), Ledger(tmp_path, "s"))
    again.drawn()
    assert again.next_trial(set()) == begun
    other = again.next_trial({begun.name})
    assert other is not None
    assert other.number == begun.number + 1
    assert other.values != begun.values  # two that run side by side differ


def test_a_longer_search_begins_with_the_shorter_one() -> None:
    for sampler in ("random", "tpe"):
        changes = {"search.sampler": sampler, "search.startup": 4, "search.confirm": "0x0"}
        short = searched(config_of(**changes, **{"search.trials": 8}), bowl)
        long = searched(config_of(**changes, **{"search.trials": 14}), bowl)
        assert long.trials[:8] == short.trials


def test_tpe_begins_with_earlier_trials_even_of_other_keys() -> None:
    earlier = searched(config_of(**{"search.trials": 30, "search.confirm": "0x0"}), bowl).trials
    config = config_of(
        **{
            "search.trials": 10,
            "search.sampler": "tpe",
            "search.confirm": "0x0",
            f"search.space.{RATIO}": "uniform(0.3,0.9)",
            "search.space.model.drop_path": "uniform(0,0.3)",
        }
    )
    plan = Plan(space.of(config), NotWritten(Path("nowhere"), "s"), earlier)
    plan.drawn()
    assert not plan.trials  # nothing is drawn at random: something is known
    for _ in range(10):
        run = plan.next_trial(set())
        assert run is not None
        plan.ledger.update(run.name, status=FINISHED, result=-((run.values[RATIO] - 0.6) ** 2))
    ratios = [trial.values[RATIO] for trial in plan.trials]
    assert np.mean(np.abs(np.array(ratios) - 0.6) < 0.1) > 0.6  # at random one in three


def test_no_point_is_tried_twice_and_none_counts_twice() -> None:
    changes = {f"search.space.{R}": "choice(4,8,12)", "search.space.model.depth": "uniform(1,2)"}
    for sampler in ("random", "tpe"):
        config = config_of(**changes, **{"search.trials": 20, "search.sampler": sampler, "search.startup": 2})
        plan = searched(config, noisy(lambda _: 0.4, 0))
        points = [str(trial.values) for trial in plan.trials]
        assert len(points) == len(set(points)) == plan.wanted == 6
        candidates = [str(trial.values) for trial in plan.candidates()]
        assert len(candidates) == len(set(candidates)) == 2


def test_the_verdict_says_worse_where_all_are_worse() -> None:
    said = judge([0.50, 0.51, 0.49], {3: [0.30, 0.31, 0.29], 4: [0.2, 0.21, 0.2]})
    assert verdict.sentence(said, "trial 3").startswith(
        "the recipe is better: trial 3, the best of those that ran again"
    )
    assert judge([0.5, 0.5], {3: [0.6, 0.6]}) is None  # no scatter at all: nothing to compare with


def test_what_failed_is_tried_again_by_the_next_command(tmp_path: Path) -> None:
    config = config_of(**{"search.trials": 4})
    plan = Plan(space.of(config), Ledger(tmp_path, "s"))
    plan.drawn()
    for trial in plan.trials[:3]:
        plan.ledger.update(trial.name, status=FAILED, reason="no room left")
    assert plan.hopeless
    again = Plan(space.of(config), Ledger(tmp_path, "s"))
    again.again()
    again.drawn()
    assert not again.hopeless
    assert again.next_trial(set()) == again.trials[0]
    assert not again.trials[0].reason


def test_a_search_in_which_all_fail_ends_early() -> None:
    plan = Plan(space.of(config_of()), NotWritten(Path("nowhere"), "s"))
    plan.drawn()
    begun: set[str] = set()
    while not plan.hopeless:
        run = plan.next_trial(begun)
        assert run is not None
        begun.add(run.name)
        plan.ledger.update(run.name, status=FAILED, reason="the loss is not finite")
    assert len(begun) == 3
    assert plan.hopeless == ("the first 3 trials failed, none of them reported anything: the loss is not finite")
    plan.ledger.update(plan.trials[5].name, reports=((2, 0.3),))
    assert not plan.hopeless
