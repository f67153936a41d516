"""Splits are stable, exact where that is asked for, and nobody moves between training and test."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmtr.data.dataset.splits import SPLITS, assign, split_of, stratified, stratum
from kmtr.types import InputError

GOLDEN = [*["train"] * 5, "val", "train", "train"]
"""Of the first simulated subjects: a change here would move people between training and test."""


def people(n: int) -> list[str]:
    return [f"p-{i}" for i in range(n)]


def test_hashed_splits_are_stable_and_about_70_10_20() -> None:
    ids = people(10_000)
    splits = assign(ids, "hash")
    for name, share in SPLITS.items():
        assert splits.count(name) / len(ids) == pytest.approx(share, abs=0.02)
    assert splits == [split_of(i) for i in ids]
    assert assign(ids[::-1], "hash") == splits[::-1]
    assert [split_of(f"sim-0-{i:07d}") for i in range(8)] == GOLDEN


def test_few_subjects_are_not_split_unless_asked() -> None:
    assert set(assign(people(19), "auto")) == {"train"}
    assert len(set(assign(people(40), "auto"))) == 3
    assert set(assign(people(40), "train")) == {"train"}
    assert set(assign(people(40), "test")) == {"test"}
    assert Counter(assign(people(10), "stratified")) == {"train": 7, "val": 1, "test": 2}


@given(st.lists(st.integers(0, 60), min_size=1, max_size=30))
def test_stratified_shares_are_exact_in_every_stratum_and_over_all(sizes: list[int]) -> None:
    strata = [f"{s:02d}" for s, size in enumerate(sizes) for _ in range(size)]
    ids = people(len(strata))
    splits = stratified(ids, strata, {})
    for s, size in enumerate(sizes):
        here = Counter(split for split, stratum in zip(splits, strata, strict=True) if stratum == f"{s:02d}")
        for name, share in SPLITS.items():
            assert abs(here[name] - share * size) < 1 + 1e-9
    for name, share in SPLITS.items():
        assert abs(splits.count(name) - share * len(ids)) <= 2  # not one per stratum
    order = sorted(range(len(ids)), key=lambda i: split_of(ids[i]))
    again = stratified([ids[i] for i in order], [strata[i] for i in order], {})
    assert again == [splits[i] for i in order]


def test_rare_strata_do_not_all_end_in_training() -> None:
    splits = Counter(stratified(people(1000), [f"{i:04d}" for i in range(1000)], {}))
    assert splits == {"train": 700, "val": 100, "test": 200}
    first = Counter(stratified(people(1000), [f"{i:04d}" for i in range(1000)], {})[:100])
    assert first == {"train": 70, "val": 10, "test": 20}


@pytest.mark.parametrize("how", ["hash", "stratified", "auto", "train"])
def test_who_was_split_before_stays_and_the_new_ones_fill_up(how: str) -> None:
    ids = people(300)
    before = assign(ids, how, ["a"] * 100 + ["b"] * 200)
    more = people(1000)
    after = assign(
        more, how, ["a"] * 100 + ["b"] * 200 + ["a"] * 500 + ["c"] * 200, dict(zip(ids, before, strict=True))
    )
    assert after[:300] == before
    if how == "stratified":
        for rows in (slice(0, 1000), slice(800, 1000)):
            shares = Counter(after[rows])
            for name, share in SPLITS.items():
                assert shares[name] == pytest.approx(share * len(after[rows]), abs=1.01)
    one_sided = dict.fromkeys(ids[:100], "test")  # more than its quota: kept, and the rest makes up for it
    found = Counter(stratified(ids, [""] * 300, one_sided))
    assert found == {"train": 175, "val": 25, "test": 100}


def test_a_stratum_is_sex_and_diseases_where_known() -> None:
    assert stratum({"male": 1.0, "dcm": 1.0, "hcm": 0.0, "lvef_pct": 30.0}) == "male dcm"
    assert stratum({"male": 0.0, "infarct": 1.0, "hypertension": 1.0}) == "female infarct hypertension"
    assert stratum({"lvef_pct": 60.0, "male": float("nan")}) == ""


def test_a_subject_twice_is_one_line() -> None:
    with pytest.raises(InputError, match="subjects: expected each once, got p-1 2 times"):
        assign(["p-0", "p-1", "p-1"], "hash")
