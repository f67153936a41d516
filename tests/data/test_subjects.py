"""Choice of subjects: nested, reproducible, apart from each other, and named once each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cohort import simulated, write
from hypothesis import given
from hypothesis import strategies as st

from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import subjects
from kmtr.types import InputError

RARE = np.array([True, True, False])
"""Targets of `cohort_of`: two diseases and a phenotype."""


@pytest.mark.parametrize("choose", [subjects.validated, subjects.labelled, subjects.held_out])
def test_a_smaller_choice_is_the_beginning_of_a_larger_one(choose: Callable[[int, int, int], list[int]]) -> None:
    assert sorted(choose(3, 50, 80)) == list(range(50))
    assert choose(3, 50, 80)[:7] == choose(3, 50, 7) != choose(4, 50, 7)
    assert choose(3, 0, 7) == []


def test_the_choice_stays_what_it_was() -> None:
    """Published numbers are of these subjects."""
    assert subjects.validated(0, 100, 4) == [12, 80, 92, 79]
    assert subjects.labelled(0, 100, 4) == subjects.held_out(0, 100, 4) == [57, 11, 58, 51]


def test_labels_and_pseudonyms_are_those_of_the_rows(small: RunConfig, tmp_path: Path) -> None:
    studies = [simulated(i, small) for i in range(3)]
    for name in ("one", "two"):
        write(tmp_path / name, {"test": studies})
    reader = Dataset.of(str(tmp_path / "one"), str(tmp_path / "two")).reader("test", small.data)
    ids = [study.subject_id for study in studies]
    assert subjects.pseudonyms(reader, [2, 0, 5]) == [ids[2], ids[0], f"{ids[2]}#2"], "each row has its own name"
    found = subjects.labels_of(reader, [2, 4], ("lvm_g", "lvedv_ml"))
    expected = [[studies[i].labels[name] for name in ("lvm_g", "lvedv_ml")] for i in (2, 1)]
    np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------------------------------------------- budgets of labels


def cohort_of(subjects_: int, seed: int = 0) -> np.ndarray:
    """Labels of a cohort: a disease of 40 %, one of 2 %, and a phenotype that few have; some subjects have no label."""
    rng = np.random.default_rng(seed)
    labels = np.stack(
        [rng.random(subjects_) < 0.4, rng.random(subjects_) < 0.02, rng.normal(150, 30, subjects_)], axis=1
    ).astype(np.float64)
    labels[rng.random(labels.shape) < (0.1, 0.1, 0.8)] = np.nan
    return labels


@given(st.integers(0, 99), st.integers(0, 2**31), st.lists(st.integers(11, 250), min_size=2, max_size=4))
def test_budgets_are_nested_and_lack_no_label(cohort: int, seed: int, counts: list[int]) -> None:
    labels = cohort_of(300, cohort)
    budgets = [set(subjects.budget(seed, labels, RARE, count).tolist()) for count in sorted(counts)]
    assert [len(budget) for budget in budgets] == sorted(counts)
    for smaller, larger in pairwise(budgets):
        assert smaller <= larger
    for budget in budgets:
        mine = labels[sorted(budget)]
        assert np.isfinite(mine).any(1).all(), "a budget is of labelled subjects"
        assert (np.isfinite(mine).sum(0) >= np.minimum(3, np.isfinite(labels).sum(0))).all()
        for column in (0, 1):
            for value in (0, 1):
                there = (labels[:, column] == value).sum()
                assert (mine[:, column] == value).sum() >= min(2, there)


def test_a_budget_is_a_function_of_seed_and_labels_alone() -> None:
    labels = cohort_of(300)
    chosen = [tuple(subjects.budget(seed, labels, RARE, 40)) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert all(rows == tuple(sorted(rows)) for rows in chosen)
    known = np.nan_to_num(labels)
    first = np.isin(subjects.labelled(0, 300, 40), subjects.budget(0, known, RARE, 40))
    assert first.sum() >= 40 - 9, "the random order that probes take, but for what no budget may lack"


def test_where_no_label_is_asked_for_every_subject_may_be_chosen() -> None:
    found = subjects.budget(0, np.empty((50, 0)), np.empty(0, bool), 50)
    assert found.tolist() == list(range(50))


@pytest.mark.parametrize(("count", "expected"), [(3, r"at least \d+, with which"), (301, "at most 300, the training")])
def test_budgets_that_can_not_be_had_are_refused_in_a_line(count: int, expected: str) -> None:
    labels = np.nan_to_num(cohort_of(300))
    with pytest.raises(InputError, match=rf"^task\.labels: expected {expected} .* got {count}$") as error:
        subjects.budget(0, labels, RARE, count)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"at most 0, the training subjects"):
        subjects.budget(0, np.full((9, 1), np.nan), np.array([False]), 4)


def partly(count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """A disease that is known of every other subject and a phenotype that all have."""
    rows = np.arange(count)
    disease = np.where(rows % 2 == 0, (rows % 12 == 0).astype(float), np.nan)
    return np.stack([disease, 100.0 + rows], axis=1), np.array([True, False])


def contoured(row: int) -> bool:
    return row % 3 == 0


def test_subjects_that_every_task_learns_from_come_first() -> None:
    """Disease, phenotype and contours: every sixth has all of them, and those who lack one follow at random."""
    labels, diseases = partly()
    complete = set(range(0, 40, 6))
    budgets = [
        set(subjects.budget(seed, labels, diseases, count, [[0], [1]], [contoured]).tolist())
        for seed in (0, 1)
        for count in (5, 7, 15, 40)
    ]
    for five, seven, fifteen, every in (budgets[:4], budgets[4:]):
        assert five < seven == complete < fifteen < every == set(range(40))
        assert {int(labels[row, 0]) for row in five} == {0, 1}
    assert budgets[2] != budgets[6]


def test_where_nobody_has_everything_no_task_goes_without() -> None:
    """Those with contours have no label: 3 of them are in the smallest budget all the same."""
    labels, diseases = partly(60)
    labels[[contoured(row) for row in range(60)]] = np.nan
    labels[1::2, 0] = np.nan
    chosen = subjects.budget(0, labels, diseases, 9, [[0], [1]], [contoured]).tolist()
    assert sum(map(contoured, chosen)) >= 3
    assert np.isfinite(labels[chosen]).sum(0).min() >= 3
    assert np.isfinite(labels[:, 1]).sum() == 40
    assert len(subjects.budget(0, labels, diseases, 60, [[0], [1]], [contoured])) == 60


def test_masks_alone_make_a_budget_of_those_who_have_them() -> None:
    nothing, none = np.empty((50, 0)), np.empty(0, bool)
    assert subjects.budget(0, nothing, none, 17, (), [contoured]).tolist() == list(range(0, 50, 3))
    with pytest.raises(InputError, match=r"expected at most 17, the training subjects with a label .* got 18$"):
        subjects.budget(0, nothing, none, 18, (), [contoured])


def test_of_few_subjects_is_asked_whether_they_have_masks() -> None:
    labels, diseases = np.nan_to_num(cohort_of(3000)), RARE
    asked = set()

    def has(row: int) -> bool:
        asked.add(row)
        return True

    found = subjects.budget(0, labels, diseases, 40, [[0, 1], [2]], [has])
    assert asked == set(found.tolist())
    np.testing.assert_array_equal(found, subjects.budget(0, labels, diseases, 40))
