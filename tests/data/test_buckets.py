"""Few shapes that fit everyone, never worse for being allowed more, and padding counted as a plan really pads."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmtr.data.loader.buckets import Buckets, Shape, choose, product, waste
from kmtr.data.loader.order import Plan, Source
from kmtr.types import InputError

SCANNERS: list[Shape] = [
    (slices, coils, 25, *matrix)
    for matrix in ((128, 128), (160, 128), (192, 160))
    for coils in (8, 10)
    for slices in range(6, 13)
]
SHAPES = st.tuples(
    st.integers(1, 12), st.sampled_from([1, 4, 8]), st.sampled_from([8, 12]), *[st.sampled_from([64, 96, 128])] * 2
)
CLASSES = st.dictionaries(SHAPES, st.integers(1, 400), min_size=1, max_size=9)


def with_long_axis(sizes: np.ndarray) -> np.ndarray:
    return (sizes[..., 0] + 3) * product(sizes[..., 1:])


def fits(shape: Shape, into: Shape) -> bool:
    return all(a <= b for a, b in zip(shape, into, strict=True))


@settings(max_examples=20)
@given(CLASSES, st.integers(1, 10), st.integers(1, 64))
def test_every_class_fits_its_bucket_and_the_overflow(classes: dict[Shape, int], limit: int, batch: int) -> None:
    shapes, counts = list(classes), list(classes.values())
    found = choose(shapes, counts, limit, batch)
    assert len(found.shapes) <= limit
    assert len(set(found.shapes)) == len(found.shapes)
    assert found.shapes[found.overflow] == tuple(np.max(shapes, axis=0))
    for shape, bucket in zip(shapes, found.of_class, strict=True):
        assert fits(shape, found.shapes[bucket])
        assert fits(shape, found.shapes[found.overflow])
    used = set(found.of_class) | {found.overflow}
    assert used == set(range(len(found.shapes)))


@settings(max_examples=10)
@given(CLASSES, st.integers(1, 64), st.randoms(use_true_random=False))
def test_more_shapes_never_waste_more_and_the_order_of_classes_says_nothing(classes, batch, random) -> None:  # type: ignore[no-untyped-def]
    shapes, counts = list(classes), list(classes.values())
    wasted = [waste(choose(shapes, counts, limit, batch), shapes, counts, batch).total for limit in (1, 2, 3, 5, 8)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(wasted))
    mixed = random.sample(range(len(shapes)), len(shapes))
    again = choose([shapes[i] for i in mixed], [counts[i] for i in mixed], 4, batch)
    straight = choose(shapes, counts, 4, batch)
    assert again.shapes == straight.shapes
    assert again.of_class == tuple(straight.of_class[i] for i in mixed)


@settings(max_examples=20)
@given(CLASSES, st.integers(1, 6), st.integers(1, 64))
def test_waste_is_what_a_plan_pads(classes: dict[Shape, int], limit: int, batch: int) -> None:
    """Subjects at each shape are those of an epoch, the plan's tail included."""
    shapes, counts = list(classes), list(classes.values())
    found = choose(shapes, counts, limit, batch)
    runs = np.array([(n, i) for i, n in enumerate(counts)])
    rows = sum(counts)
    plan = Plan([Source(rows, np.array([[rows, 1]]), runs)], batch, tail="pad", buckets=found)
    slots = [plan.batch(step) for step in range(plan.steps_per_epoch)]
    trained = np.bincount([s.bucket for s in slots], [s.real for s in slots], len(found.shapes))
    counted = waste(found, shapes, counts, batch)
    np.testing.assert_array_equal(counted.subjects, trained)
    np.testing.assert_allclose(counted.cells, trained * product(np.array(found.shapes)) / 1e6)
    assert counted.held.sum() == pytest.approx(sum(n * math.prod(s) for s, n in classes.items()) / 1e6)
    assert counted.total == pytest.approx(1 - counted.held.sum() / counted.cells.sum())
    assert (counted.shares >= -1e-12).all()


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_near_the_best_of_all_partitions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = list({tuple(shape) for shape in rng.integers(1, 9, (5, 5)).tolist()})
    counts, limit, batch = rng.integers(1, 200, len(shapes)).tolist(), 3, 16
    chosen = waste(choose(shapes, counts, limit, batch), shapes, counts, batch).cells.sum()
    top = np.max(shapes, axis=0)
    best = math.inf
    for member in itertools.product(range(limit), repeat=len(shapes)):
        sizes = [tuple(np.max(np.array(shapes)[np.array(member) == b], 0, initial=1).tolist()) for b in range(limit)]
        sizes[0] = tuple(top.tolist())
        order = sorted(range(limit), key=lambda b: (b == 0, math.prod(sizes[b])))  # the overflow last
        of_class = tuple(order.index(b) for b in member)
        state = Buckets(tuple(sizes[b] for b in order), of_class, limit - 1)
        best = min(best, float(waste(state, shapes, counts, batch).cells.sum()))
    assert best * (1 - 1e-9) <= chosen <= 1.05 * best


def test_scanners_of_42_kinds_pad_about_15_percent_in_8_shapes() -> None:
    counts = np.random.default_rng(0).multinomial(4200, np.full(len(SCANNERS), 1 / len(SCANNERS))).tolist()
    assert len(SCANNERS) == 42
    for batch, most in ((8, 0.15), (32, 0.16)):
        found = choose(SCANNERS, counts, 8, batch, with_long_axis)
        assert waste(found, SCANNERS, counts, batch, with_long_axis).total < most
    assert waste(choose(SCANNERS, counts, 1, 32), SCANNERS, counts, 32).total > 0.4


def test_a_class_too_small_for_a_batch_joins_a_neighbour() -> None:
    """Alone it would only be a shape more: all its subjects would move up."""
    shapes: list[Shape] = [(6, 1, 8, 64, 64), (7, 1, 8, 64, 64), (12, 8, 8, 64, 64)]
    found = choose(shapes, [5, 315, 320], 8, 32)
    assert found == Buckets(((7, 1, 8, 64, 64), (12, 8, 8, 64, 64)), (0, 0, 1), 1)
    assert choose(shapes, [320, 320, 320], 8, 32).of_class == (0, 1, 2)


def test_the_overflow_is_a_shape_of_its_own_where_no_class_has_it() -> None:
    shapes: list[Shape] = [(6, 4, 8, 64, 64), (12, 1, 8, 64, 64)]
    found = choose(shapes, [64, 64], 3, 32)
    assert found == Buckets(((12, 1, 8, 64, 64), (6, 4, 8, 64, 64), (12, 4, 8, 64, 64)), (1, 0), 2)
    assert choose(shapes, [64, 64], 1, 32) == Buckets(((12, 4, 8, 64, 64),), (0, 0), 0)
    assert choose(shapes, [64, 64], 2, 32).of_class in ((0, 1), (1, 0))


def test_cells_may_count_long_axis_slices_and_what_subjects_lack() -> None:
    shapes: list[Shape] = [(6, 1, 8, 64, 64), (12, 1, 8, 64, 64)]
    one = choose(shapes, [32, 32], 1, 32, with_long_axis)
    assert waste(one, shapes, [32, 32], 32, with_long_axis).total == pytest.approx(1 - (9 + 15) / 30)
    plane = 8 * 64 * 64
    assert waste(one, shapes, [32, 32], 32, with_long_axis, [7.0 * plane, 15.0 * plane]).total == pytest.approx(
        1 - 22 / 30
    )


def test_leftovers_are_counted_at_the_shape_they_train_at() -> None:
    shapes: list[Shape] = [(6, 1, 8, 64, 64), (12, 1, 8, 64, 64)]
    counted = waste(choose(shapes, [40, 64], 2, 32), shapes, [40, 64], 32)
    np.testing.assert_array_equal(counted.subjects, [32, 72])
    np.testing.assert_allclose(counted.shares, [0, 1 - (64 + 8 / 2) / 72])


def test_no_classes_and_no_shapes_are_refused() -> None:
    for shapes, limit in (([], 1), ([(1,) * 5], 0)):
        with pytest.raises(InputError, match=r"^plan\.shapes: expected a positive limit"):
            choose(shapes, [1] * len(shapes), limit, 8)


def test_many_classes_are_merged_in_seconds() -> None:
    rng = np.random.default_rng(0)
    shapes = list({tuple(s) for s in rng.integers(1, 40, (150, 5)).tolist()})
    assert len(choose(shapes, [7] * len(shapes), 8, 64).shapes) <= 8
