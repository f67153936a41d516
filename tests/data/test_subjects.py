"""Choice of subjects: nested, reproducible, apart from each other, and named once each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cohort import simulated, write

from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import subjects


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
