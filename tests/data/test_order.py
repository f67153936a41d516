"""Every row exactly once a pass, the same global batches at any number of workers, and any step from scratch."""

from __future__ import annotations

import math
import pickle
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmtr.data.loader.buckets import Buckets, Shape, choose
from kmtr.data.loader.order import Plan, Slot, Source, check_workers, permutation
from kmtr.types import InputError

# Type checks under pytest pick items at random; they decide nothing.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

SHAPES: list[Shape] = [(6, 1, 4, 64, 64), (6, 4, 4, 64, 64), (8, 1, 4, 96, 64), (12, 1, 4, 64, 64)]


def source(sizes: list[int], classes: list[int] | None = None, weight: float = 0.0) -> Source:
    """Row groups of these sizes; `classes` has one class per row."""
    rows = sum(sizes)
    return Source(rows, runs(sizes, size_first=False), runs(classes or [0] * rows, size_first=True), weight)


def runs(values: list[int], size_first: bool) -> np.ndarray:
    coded = [(len(list(same)), value) for value, same in groupby(values)]
    return np.array([(n, v) for n, v in coded], np.int64).reshape(-1, 2)


def one(rows: int, per_group: int = 1) -> list[Source]:
    return [source([per_group] * (rows // per_group) + ([rows % per_group] if rows % per_group else []))]


@st.composite
def sources(draw: st.DrawFn, weighted: bool | None = None) -> list[Source]:
    sizes = st.one_of(
        st.lists(st.just(1), min_size=1, max_size=90),
        st.lists(st.integers(1, 12), min_size=1, max_size=25),
        st.lists(st.just(7), min_size=1, max_size=20),
    )
    every = draw(st.lists(sizes, min_size=1, max_size=3))
    with_weights = draw(st.booleans()) if weighted is None else weighted
    few = draw(st.integers(1, len(SHAPES)))
    made = []
    for each in every:
        classes = draw(st.lists(st.integers(0, few - 1), min_size=sum(each), max_size=sum(each)))
        made.append(source(each, classes, draw(st.sampled_from([0.1, 0.3, 1.0, 2.5])) if with_weights else 0.0))
    return made


@st.composite
def plans(draw: st.DrawFn, weighted: bool | None = None, bucketed: bool | None = None) -> Plan:
    given_sources = draw(sources(weighted))
    tail = draw(st.sampled_from(["drop", "pad"]))
    rows = sum(s.rows for s in given_sources)
    batch = draw(st.integers(1, min(64, rows) if tail == "drop" else 64))
    buckets = None
    if draw(st.booleans()) if bucketed is None else bucketed:
        counts = sum(np.bincount(classes(s), minlength=len(SHAPES)) for s in given_sources)
        buckets = choose(SHAPES, counts.tolist(), draw(st.integers(1, 4)), batch)
    return Plan(given_sources, batch, draw(st.integers(0, 2**32)), tail, draw(st.integers(1, 5)), buckets)


def classes(s: Source) -> np.ndarray:
    return np.repeat(s.shapes[:, 1], s.shapes[:, 0])


def again(plan: Plan) -> Plan:
    return Plan(plan.sources, plan.global_batch, plan.seed, plan.tail, plan.window, plan.buckets)


def slots(plan: Plan, epoch: int) -> list[Slot]:
    return [plan.batch(plan.step_of(epoch, offset)) for offset in range(plan.steps_per_epoch)]


def same(a: Slot, b: Slot) -> bool:
    arrays = ("row", "epoch", "repeated")
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays) and (a.bucket, a.real) == (
        b.bucket,
        b.real,
    )


def drawn(plan: Plan, epochs: range) -> Counter[tuple[int, int]]:
    """(row, epoch) -> how often, repeats left out."""
    found: Counter[tuple[int, int]] = Counter()
    for epoch in epochs:
        for slot in slots(plan, epoch):
            real = ~slot.repeated
            assert real.sum() == slot.real
            found.update(zip(slot.row[real].tolist(), slot.epoch[real].tolist(), strict=True))
    return found


# ------------------------------------------------------------------------------------------------------ exactly once


@given(plans(weighted=False), st.integers(0, 3))
def test_an_epoch_holds_every_row_once(plan: Plan, epoch: int) -> None:
    found = drawn(plan, range(epoch, epoch + 1))
    assert set(found.values()) == {1}
    assert {passed for _, passed in found} == {epoch}
    missing = set(range(plan.subjects)) - {row for row, _ in found}
    assert len(found) + len(missing) == plan.subjects
    if plan.tail == "drop":
        assert len(missing) == plan.subjects % plan.global_batch
    else:
        assert not missing


@given(plans(weighted=True))
def test_by_weight_every_row_comes_once_a_pass_of_its_own_source(plan: Plan) -> None:
    """A source's passes run on from epoch to epoch, and no draw is lost."""
    epochs = 3
    found = drawn(plan, range(epochs))
    assert set(found.values()) == {1}
    assert sum(found.values()) == epochs * plan.steps_per_epoch * plan.global_batch
    first = 0
    for s, draws in zip(plan.sources, plan.draws, strict=True):
        own = Counter(epoch for row, epoch in found if first <= row < first + s.rows)
        whole, rest = divmod(epochs * draws, s.rows)
        assert own == {v: n for v, n in [*((v, s.rows) for v in range(whole)), (whole, rest)] if n}
        first += s.rows


@given(plans())
def test_repeats_only_fill_up_the_last_batch_of_an_epoch(plan: Plan) -> None:
    epoch = slots(plan, 1)
    for slot in epoch[:-1]:
        assert not slot.repeated.any()
    last = epoch[-1]
    assert len(last) == plan.global_batch
    if plan.tail == "drop" or plan.weighted:
        assert last.real == plan.global_batch
    else:
        assert last.real == (plan.subjects - 1) % plan.global_batch + 1
    assert set(last.row) == set(last.row[~last.repeated])  # repeats read nothing else
    for world in (2, 4, 8):
        if plan.global_batch % world == 0:
            real = [len(p) - int(p.repeated.sum()) for p in shares(plan, plan.steps_per_epoch * 2 - 1, world)]
            assert max(real) - min(real) <= 1


@given(plans(weighted=False), st.data(), st.integers(0, 3))
def test_a_plan_over_some_rows_draws_those_alone_and_each_once(plan: Plan, data: st.DataObject, epoch: int) -> None:
    """As a budget of labels: the same promises over a subset, by its rows' own numbers."""
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, plan.subjects - 1), min_size=1))))
    ends = np.cumsum([s.rows for s in plan.sources])
    parts = [chosen[(chosen >= end - s.rows) & (chosen < end)] for s, end in zip(plan.sources, ends, strict=True)]
    fewer = [s.only(part - (end - s.rows)) for s, part, end in zip(plan.sources, parts, ends, strict=True)]
    for s, less, part, end in zip(plan.sources, fewer, parts, ends, strict=True):
        assert classes(less).tolist() == classes(s)[part - (end - s.rows)].tolist()
        assert less.group_sizes().tolist() == [n for n in np.bincount(s.group_of_row()[part - (end - s.rows)]) if n]
    batch = min(plan.global_batch, len(chosen)) if plan.tail == "drop" else plan.global_batch
    few = Plan(fewer, batch, plan.seed, plan.tail, plan.window, plan.buckets, chosen)
    found = drawn(few, range(epoch, epoch + 1))
    assert set(found.values()) == {1}
    assert {row for row, _ in found} <= set(chosen.tolist())
    assert len(chosen) - len(found) == (len(chosen) % batch if plan.tail == "drop" else 0)
    for world in (1, 2):
        if batch % world == 0:
            step = few.step_of(epoch, few.steps_per_epoch - 1)
            parts_of = [part.row for part in shares(few, step, world)]
            np.testing.assert_array_equal(np.concatenate(parts_of), few.batch(step).row)
    assert same(pickle.loads(pickle.dumps(few)).batch(epoch), few.batch(epoch))


def test_rows_that_the_sources_do_not_have_are_refused() -> None:
    with pytest.raises(InputError, match="expected sources of the 2 rows chosen, got 9 rows"):
        Plan(one(9), 2, rows=np.array([1, 4]))


def test_dropped_rows_are_others_each_epoch() -> None:
    for per_group in (1, 5, 20):
        plan = Plan(one(20, per_group), 8)
        assert plan.steps_per_epoch == 2
        epochs = [frozenset(row for row, _ in drawn(plan, range(e, e + 1))) for e in range(24)]
        missed = Counter(row for epoch in epochs for row in set(range(20)) - epoch)
        assert sum(missed.values()) == 24 * 4
        assert set(missed) == set(range(20))
        assert max(missed.values()) <= 14  # expected 4.8


def test_fewer_rows_than_a_batch_are_refused_or_padded() -> None:
    with pytest.raises(InputError, match=r"^data\.global_batch: expected at most the 7 training subjects of the d"):
        Plan(one(7), 8)
    (slot,) = slots(Plan(one(3), 8, tail="pad"), 0)
    assert (slot.real, len(slot), sorted(set(slot.row.tolist()))) == (3, 8, [0, 1, 2])
    with pytest.raises(InputError, match="expected at most the 0 training subjects"):
        Plan(one(0), 1)


# --------------------------------------------------------------------------------------------------- any world size


def shares(plan: Plan, step: int, world: int) -> list[Slot]:
    return [plan.share(step, rank, world) for rank in range(world)]


@given(plans(), st.integers(0, 1000))
def test_the_global_batch_is_the_same_at_every_number_of_workers(plan: Plan, step: int) -> None:
    whole = plan.batch(step)
    assert len(whole) == plan.global_batch
    for world in range(1, 65):
        if plan.global_batch % world:
            with pytest.raises(InputError, match=f"data.global_batch: expected a multiple of the {world} workers"):
                plan.share(step, 0, world)
            continue
        parts = shares(plan, step, world)
        assert {len(part) for part in parts} == {plan.global_batch // world}  # every rank has every step
        assert {(part.bucket, part.real) for part in parts} == {(whole.bucket, whole.real)}
        for name in ("row", "epoch", "repeated"):
            np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))


@given(plans(), st.integers(0, 200))
def test_any_cursor_goes_on_identically(plan: Plan, step: int) -> None:
    for later in range(step, step + 3):
        assert same(again(plan).batch(later), plan.batch(later))
    travelled = pickle.loads(pickle.dumps(plan))
    assert same(travelled.batch(step), plan.batch(step))


@given(plans(), st.integers(0, 1000))
def test_a_cursor_is_an_epoch_and_a_step_in_it(plan: Plan, step: int) -> None:
    epoch, offset = plan.cursor(step)
    assert (epoch, plan.step_of(epoch, offset)) == (plan.epoch(step), step)
    assert 0 <= offset < plan.steps_per_epoch


def test_an_elastic_range_is_checked_whole() -> None:
    check_workers(24, 1, 4)
    check_workers(64, 8, 8)
    with pytest.raises(InputError, match=r"from 2 to 4 \(of 12\), got 16, which 3 does not divide"):
        check_workers(16, 2, 4)


# --------------------------------------------------------------------------------------------------- shapes, weights


@given(plans(bucketed=True))
def test_each_batch_has_one_shape_that_fits_all_its_rows(plan: Plan) -> None:
    assert plan.buckets is not None
    of_row = np.concatenate([classes(s) for s in plan.sources])
    for slot in slots(plan, 0):
        fits = plan.buckets.shapes[slot.bucket]
        for row in slot.row:
            assert all(a <= b for a, b in zip(SHAPES[of_row[row]], fits, strict=True))
            at = plan.buckets.of_class[of_row[row]]
            while at not in (slot.bucket, plan.buckets.overflow):  # its own, or on the way up from there
                at = plan.buckets.above[at]
            assert slot.bucket == at


@given(plans(weighted=False, bucketed=True))
def test_less_than_a_batch_of_each_shape_moves_up(plan: Plan) -> None:
    assert plan.buckets is not None
    of_row = np.asarray(plan.buckets.of_class)[np.concatenate([classes(s) for s in plan.sources])]
    moved = Counter(
        of_row[row] for slot in slots(plan, 0) for row in slot.row[~slot.repeated] if of_row[row] != slot.bucket
    )
    assert all(n < plan.global_batch for n in moved.values())


def test_batches_of_different_shapes_come_in_turn() -> None:
    halves = [0] * 320 + [1] * 320
    plan = Plan([source([1] * 640, halves)], 8, buckets=Buckets(((1,) * 5, (2,) * 5), (0, 1), 1))
    order = [slot.bucket for slot in slots(plan, 0)]
    assert sorted(order) == [0] * 40 + [1] * 40
    assert 20 <= sum(a != b for a, b in pairwise(order)) <= 60  # a coin's sequence: 40 +- 4.5
    assert order != [slot.bucket for slot in slots(plan, 1)]


@given(plans(bucketed=False))
def test_every_batch_has_each_source_in_its_share(plan: Plan) -> None:
    """By weight, or by rows: within one row, in every full batch."""
    by = [s.weight if plan.weighted else s.rows for s in plan.sources]
    edges = np.cumsum([0, *(s.rows for s in plan.sources)])
    for epoch in (0, 1):
        for slot in slots(plan, epoch):
            if slot.real == plan.global_batch:
                counts = np.histogram(slot.row, edges)[0]
                assert (abs(counts - np.array(by) / sum(by) * plan.global_batch) < 1 + 1e-9).all()


def test_a_weight_without_subjects_or_for_some_alone_is_refused() -> None:
    for other in (source([], weight=1.0), source([1, 1])):
        with pytest.raises(InputError, match=r"^data\.weights: expected a weight and subjects for every dataset"):
            Plan([source([1] * 9, weight=1.0), other], 2)


def test_a_source_that_contradicts_itself_is_refused() -> None:
    for groups, shapes in (([[3, 2]], [[5, 0]]), ([[5, 1]], [[4, 0]])):
        with pytest.raises(InputError, match="that hold its 5 rows"):
            Source(5, np.array(groups), np.array(shapes))
    with pytest.raises(InputError, match="expected a weight from 0"):
        source([1], weight=-1.0)
    with pytest.raises(InputError, match="buckets: expected one for each shape class, got 1 for class 3"):
        Plan([source([1] * 4, [3] * 4)], 2, buckets=Buckets(((1,) * 5,), (0,), 0))


# ------------------------------------------------------------------------------------------------------------ reading


def openings(plan: Plan, epoch: int) -> Iterator[list[int]]:
    """Per lane the row groups in the order in which it comes to them (one bucket)."""
    groups = np.concatenate([s.group_of_row() + 1_000_000 * i for i, s in enumerate(plan.sources)])
    full = [slot.row for slot in slots(plan, epoch) if slot.real == plan.global_batch]
    if full:  # else a padded tail is all there is
        yield from (groups[lane].tolist() for lane in np.stack(full).T)


@given(plans(weighted=False, bucketed=False))
def test_a_lane_reads_on_and_never_comes_back(plan: Plan) -> None:
    """With `window` groups in memory a lane opens a group once; only lanes that share a border open it both."""
    opened = 0
    for visited in openings(plan, 0):
        last = {group: i for i, group in enumerate(visited)}
        first = {group: i for i, group in reversed(list(enumerate(visited)))}
        opened += len(first)
        for i in range(len(visited)):
            assert sum(first[g] <= i <= last[g] for g in first) <= plan.window
    groups = sum(int(s.groups[:, 0].sum()) for s in plan.sources)
    assert opened <= groups + plan.global_batch - 1


def test_rows_of_small_groups_are_shuffled_in_windows() -> None:
    """A lane's steps: the order is neither that of the file nor confined to one group."""
    near, far = (Plan(one(64 * 40, 40), 4, window=w) for w in (1, 4))
    for plan, together in ((near, 1), (far, 4)):
        lanes = np.stack([slot.row for slot in slots(plan, 0)]).T // 40
        for lane in lanes:
            for window in lane.reshape(-1, 40 * together):
                assert len(set(window.tolist())) == together
                assert len(set(window[: 10 * together].tolist())) == together
    rows = np.stack([slot.row for slot in slots(near, 0)]).T
    assert not (np.diff(rows[0].reshape(-1, 40)) == 1).all()


def test_a_single_group_is_a_full_shuffle() -> None:
    """Else two rows that are neighbours in the file could never meet in a batch."""
    plan = Plan(one(24, 24), 8)
    met = sum({5, 6} <= set(slot.row.tolist()) for epoch in range(300) for slot in slots(plan, epoch))
    assert met == pytest.approx(300 * 7 / 23, abs=4 * math.sqrt(300 * 7 / 23 * 16 / 23))


# -------------------------------------------------------------------------------------------------------- randomness


def test_every_step_is_as_likely_for_every_row() -> None:
    epochs = 400
    for sources_, buckets in (
        (one(24), None),
        (one(24, 6), None),
        ([source([1] * 24, [0] * 10 + [1] * 14)], Buckets(((1,) * 5, (2,) * 5), (0, 1), 1)),
    ):
        plan = Plan(sources_, 6, buckets=buckets)
        counts = np.zeros((24, plan.steps_per_epoch))
        for epoch in range(epochs):
            for offset, slot in enumerate(slots(plan, epoch)):
                counts[slot.row, offset] += 1
        assert abs(counts / epochs - 0.25).max() < 4.5 * math.sqrt(0.25 * 0.75 / epochs)


def test_seeds_and_epochs_differ_and_numbers_stay() -> None:
    plan = Plan(one(20), 8)
    assert plan.batch(0).row.tolist() != plan.batch(2).row.tolist()
    assert plan.batch(0).row.tolist() != Plan(one(20), 8, seed=1).batch(0).row.tolist()
    assert plan.batch(0).row.tolist() == GOLDEN[0]
    assert Plan(one(20, 5), 8, window=2).batch(3).row.tolist() == GOLDEN[1]


def test_what_was_handed_out_cannot_spoil_the_order() -> None:
    plan = Plan(one(20), 8)
    before = plan.batch(0).row.copy()
    plan.batch(0).row[:] = -1
    np.testing.assert_array_equal(plan.batch(0).row, before)
    with pytest.raises(ValueError, match="read-only"):
        permutation(0, 0, 20)[0] = 5


# ---------------------------------------------------------------------------------------------------------- big ones


def test_threads_build_an_epoch_once_and_two_stay() -> None:
    plan = Plan(one(400_000), 8)
    with ThreadPoolExecutor(8) as pool:
        began = time.process_time()
        list(pool.map(plan.batch, [0] * 8))
        together = time.process_time() - began
    began = time.process_time()
    again(plan).batch(0)
    assert together < 4 * (time.process_time() - began) + 0.05
    for epoch in range(4):
        plan.batch(plan.step_of(epoch, 0))
    assert list(plan._orders) == [2, 3]
    assert plan.share(plan.step_of(3, 7), 1, 2).row.base is None


@pytest.mark.slow
def test_ten_million_rows_are_planned_in_seconds_each_exactly_once() -> None:
    rows = 10_000_000
    began = time.process_time()
    plan = Plan([Source(rows, np.array([[rows, 1]]), np.array([[rows, 0]]))], 10_000)
    plan.batch(0)
    assert time.process_time() - began < 10
    seen = np.zeros(rows, bool)
    for slot in slots(plan, 0):
        seen[slot.row] = True
    assert seen.all()


GOLDEN = [[3, 8, 10, 16, 9, 17, 5, 14], [3, 2, 7, 6, 9, 13, 15, 19]]
"""A change here is another order for every run that goes on from a checkpoint."""
