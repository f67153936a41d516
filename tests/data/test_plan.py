"""Every subject at most once an epoch, the same global batches at any number of workers, and any step from scratch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmtr.data.plan import Plan, permutation
from kmtr.types import InputError

SIZES = st.tuples(st.integers(1, 60), st.integers(0, 200), st.integers(0, 2**32 - 1)).map(
    lambda n: Plan(subjects=n[0] + n[1], global_batch=n[0], seed=n[2])
)


@given(SIZES, st.integers(0, 5))
def test_an_epoch_is_the_beginning_of_a_permutation(plan: Plan, epoch: int) -> None:
    first = epoch * plan.steps_per_epoch
    steps = range(first, first + plan.steps_per_epoch)
    assert {plan.epoch(step) for step in steps} == {epoch}
    rows = np.concatenate([plan.batch(step) for step in steps])
    assert len(np.unique(rows)) == len(rows) == plan.steps_per_epoch * plan.global_batch
    assert rows.min() >= 0
    assert rows.max() < plan.subjects
    assert plan.subjects - len(rows) < plan.global_batch  # what is dropped is less than a batch
    np.testing.assert_array_equal(rows, permutation(plan.seed, epoch, plan.subjects)[: len(rows)])


@given(SIZES, st.integers(0, 1000), st.integers(1, 60))
def test_the_global_batch_is_the_same_at_any_number_of_workers(plan: Plan, step: int, world: int) -> None:
    if plan.global_batch % world:
        with pytest.raises(InputError, match=f"data.global_batch: expected a multiple of the {world} workers"):
            plan.share(step, 0, world)
        return
    shares = [plan.share(step, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {plan.global_batch // world}
    np.testing.assert_array_equal(np.concatenate(shares), plan.batch(step))


@given(SIZES, st.integers(0, 1000))
def test_a_step_does_not_need_those_before_it(plan: Plan, step: int) -> None:
    again = Plan(plan.subjects, plan.global_batch, plan.seed)
    permutation.cache_clear()
    np.testing.assert_array_equal(again.batch(step), plan.batch(step))


def test_a_resumed_run_goes_on_with_what_is_left() -> None:
    plan = Plan(subjects=103, global_batch=8, seed=3)
    whole = [plan.batch(step).tolist() for step in range(40)]
    for stop in (1, 12, 13, 39):
        assert [Plan(103, 8, 3).batch(step).tolist() for step in range(stop, 40)] == whole[stop:]


def test_epochs_and_seeds_differ_and_drop_other_subjects() -> None:
    plan = Plan(subjects=20, global_batch=8)
    assert plan.steps_per_epoch == 2
    epochs = [frozenset(np.concatenate([plan.batch(2 * e), plan.batch(2 * e + 1)]).tolist()) for e in range(8)]
    assert len(set(epochs)) > 1
    assert frozenset().union(*epochs) == set(range(20))
    assert plan.batch(0).tolist() != plan.batch(2).tolist()
    assert plan.batch(0).tolist() != Plan(20, 8, seed=1).batch(0).tolist()


def test_a_cached_order_cannot_be_spoilt_and_too_few_subjects_are_refused() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Plan(20, 8).batch(0)[0] = 5
    with pytest.raises(InputError, match="expected at most the 7 training subjects of the dataset, got 8"):
        Plan(7, 8)
