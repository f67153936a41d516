"""Dice and Hausdorff distance: closed forms, absent classes, what nobody labelled, other implementations."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.spatial.distance import cdist

from kmtr.metrics import contour_distance, dice_at, extreme_frames, hd95
from kmtr.metrics.dense import Pair, mask_distances, mask_scores
from kmtr.metrics.segmentation import CLASSES, LA, LV_CAVITY, LV_MYOCARDIUM, RA, RV
from kmtr.types import UNLABELLED, InputError

SPACING = (8.0, 1.5, 2.5)
MASKS = arrays.arrays(np.uint8, (2, 3, 12, 11), elements=st.sampled_from([0, 0, 1, 2, 3, 4]))


def disc(size: int, centre: tuple[float, float], radius: float) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2


def square(top: int, left: int, size: int = 8) -> np.ndarray:
    mask = np.zeros((40, 40), bool)
    mask[top : top + size, left : left + size] = True
    return mask


def one_frame(*slices: np.ndarray) -> np.ndarray:
    return np.stack(slices).astype(np.uint8)[:, None]


def brute_force(a: np.ndarray, b: np.ndarray, pixel_mm: tuple[float, float]) -> float:
    """The definition, from all pairs of contour pixels."""
    contours = []
    for mask in (a, b):
        ring = np.pad(mask, 1)
        inner = ring[:-2, 1:-1] & ring[2:, 1:-1] & ring[1:-1, :-2] & ring[1:-1, 2:]
        contours.append(np.argwhere(mask & ~inner) * pixel_mm)
    distance = cdist(*contours)
    return float(max(np.percentile(distance.min(1), 95), np.percentile(distance.min(0), 95)))


def test_dice_of_two_overlapping_discs() -> None:
    """Two circles of radius r at the distance d share 2 r^2 acos(d / 2r) - d / 2 sqrt(4 r^2 - d^2)."""
    radius, distance = 40.0, 30.0
    truth, predicted = (one_frame(disc(200, (100, 80 + shift), radius)) for shift in (0, distance))
    shared = 2 * radius**2 * math.acos(distance / (2 * radius))
    shared -= distance / 2 * math.sqrt(4 * radius**2 - distance**2)
    scores = dice_at(truth, predicted, [0])
    assert scores.shape == (1, len(CLASSES))
    assert scores[0, LV_CAVITY - 1] == pytest.approx(shared / (math.pi * radius**2), rel=5e-3)
    assert np.isnan(scores[0, 1:]).all()


def test_dice_pools_the_slices_of_a_frame_and_reads_the_frames_asked_for() -> None:
    truth, predicted = np.zeros((2, 3, 2, 2), np.uint8), np.zeros((2, 3, 2, 2), np.uint8)
    truth[0, 2], predicted[0, 2, 0] = 1, 1  # 4 and 2 pixels, both of them shared
    predicted[1, 2] = 1
    predicted[:, 0] = 3
    scores = dice_at(truth, predicted, [2, 0])
    assert scores[0, LV_CAVITY - 1] == pytest.approx(2 * 2 / (4 + 6))
    assert scores[1, RV - 1] == 0
    assert math.isnan(scores[1, LV_CAVITY - 1])


def test_a_class_in_one_only_is_zero_and_in_neither_left_out() -> None:
    truth, predicted = one_frame(square(4, 4) * LV_CAVITY), one_frame(square(4, 4) * RV)
    scores = dice_at(truth, predicted, [0])[0]
    assert (scores[LV_CAVITY - 1], scores[RV - 1]) == (0, 0)
    assert np.isnan(scores[[LV_MYOCARDIUM - 1, LA - 1, RA - 1]]).all()


def test_classes_that_a_source_does_not_draw_are_left_out() -> None:
    truth = one_frame(square(4, 4) * LV_CAVITY)
    predicted = one_frame(np.where(square(20, 20), RV, truth[0, 0]))
    assert dice_at(truth, predicted, [0])[0, RV - 1] == 0
    contoured = (LV_CAVITY, LV_MYOCARDIUM)
    scores = dice_at(truth, predicted, [0], contoured)
    distances = contour_distance(truth, predicted, [0], SPACING, contoured)
    assert math.isnan(scores[0, RV - 1])
    assert scores[0, LV_CAVITY - 1] == 1
    assert distances.spurious.sum() == distances.missed.sum() == 0
    assert distances.hd95_mm[0, LV_CAVITY - 1] == 0


@pytest.mark.parametrize(("shift", "expected"), [((0, 3), 3 * 2.5), ((3, 0), 3 * 1.5), ((0, 0), 0.0)])
def test_hd95_of_shifted_squares_is_in_mm(shift: tuple[int, int], expected: float) -> None:
    """The sides across the shift, 8 of 28 contour pixels on each, are as far off as the shift."""
    assert hd95(square(10, 10), square(10 + shift[0], 10 + shift[1]), (1.5, 2.5)) == pytest.approx(expected)


@given(st.integers(0, 2**31))
def test_hd95_is_that_of_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (disc(24, tuple(rng.uniform(6, 18, 2)), rng.uniform(1.5, 8)) for _ in range(2))
    pixel = (float(rng.uniform(0.5, 3)), float(rng.uniform(0.5, 3)))
    assert hd95(a, b, pixel) == pytest.approx(brute_force(a, b, pixel))
    assert hd95(b, a, pixel) == hd95(a, b, pixel)


def test_missed_and_spurious_slices_are_counted_beside_the_mean() -> None:
    truth = one_frame(square(10, 10), square(10, 10), square(10, 10), np.zeros((40, 40)))
    predicted = one_frame(square(10, 12), np.zeros((40, 40)), square(10, 10), square(3, 3))
    found = contour_distance(truth, predicted, [0], SPACING)
    cell = 0, LV_CAVITY - 1
    assert (found.compared[cell], found.missed[cell], found.spurious[cell]) == (2, 1, 1)
    assert found.hd95_mm[cell] == pytest.approx((2 * 2.5 + 0) / 2)
    nothing = contour_distance(truth, np.zeros_like(truth), [0], SPACING)
    assert nothing.missed[cell] == 3
    assert math.isnan(nothing.hd95_mm[cell])


@given(MASKS, MASKS, arrays.arrays(bool, (2, 3, 12, 11)), st.integers(0, 255))
def test_what_is_predicted_where_nobody_labelled_changes_nothing(
    truth: np.ndarray, predicted: np.ndarray, unknown: np.ndarray, other: int
) -> None:
    """Where the background is known in part, so that frames are not those of sources that draw contours alone."""
    unknown[..., 0, 0], truth[..., 0, 0] = False, 0
    truth[unknown] = UNLABELLED
    changed = np.where(unknown, other, predicted).astype(np.uint8)
    np.testing.assert_array_equal(dice_at(truth, predicted, [0, 2]), dice_at(truth, changed, [0, 2]))
    before, after = (contour_distance(truth, guess, [0, 2], SPACING) for guess in (predicted, changed))
    for name in ("hd95_mm", "compared", "missed", "spurious"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


@given(MASKS, MASKS)
def test_random_masks_with_absent_classes(truth: np.ndarray, predicted: np.ndarray) -> None:
    frames = [0, 1, 2]
    scores, distance = dice_at(truth, predicted, frames), contour_distance(truth, predicted, frames, SPACING)
    for frame in frames:
        for value in CLASSES:
            a, b = truth[:, frame] == value, predicted[:, frame] == value
            cell = frame, value - 1
            there = a.any((1, 2)), b.any((1, 2))
            assert distance.compared[cell] == (there[0] & there[1]).sum()
            assert distance.missed[cell] == (there[0] & ~there[1]).sum()
            assert distance.spurious[cell] == (there[1] & ~there[0]).sum()
            assert math.isnan(distance.hd95_mm[cell]) == (distance.compared[cell] == 0)
            assert math.isnan(scores[cell]) == (not a.any() and not b.any())
    same = dice_at(truth, truth, frames)
    assert set(same[np.isfinite(same)].tolist()) <= {1.0}
    np.testing.assert_array_equal(scores, dice_at(predicted, truth, frames))


def test_frames_of_the_extremes_are_of_labelled_frames() -> None:
    truth = np.zeros((2, 5, 6, 6), np.uint8)
    for frame, size in enumerate((4, 6, 2, 1, 0)):
        truth[:, frame, :size, :4] = LV_CAVITY
    assert extreme_frames(truth) == (1, 3)
    truth[:, 3][truth[:, 3] == 0] = UNLABELLED  # as a frame is stored in which something was not contoured
    truth[:, 1] = UNLABELLED
    assert extreme_frames(truth) == (0, 3), "the cavity alone is drawn in frame 3: what it is not is known"
    assert extreme_frames(truth, (RV,)) is None
    assert extreme_frames(np.full_like(truth, UNLABELLED)) is None
    assert extreme_frames(truth[:, :1]) == (0, 0)


def test_bad_input_is_refused_in_one_line() -> None:
    mask = one_frame(square(3, 3))
    with pytest.raises(InputError, match=r"shape \(1, 1, 40, 40\), got \(1, 1, 39, 40\)"):
        inspect.unwrap(dice_at)(mask, mask[:, :, 1:], [0])  # without the test suite's type checks
    with pytest.raises(InputError, match="expected two sizes above 0 mm, got"):
        contour_distance(mask, mask, [0], (8.0, 0.0, 1.0))


def test_dice_and_hd95_are_those_of_monai() -> None:
    monai = pytest.importorskip("monai.metrics", reason="MONAI is no dependency; closed forms are tested above")
    import torch

    rng = np.random.default_rng(0)
    pairs = [[disc(48, tuple(rng.uniform(16, 32, 2)), rng.uniform(4, 14)) for _ in range(2)] for _ in range(8)]
    for a, b in pairs:
        one, other = (torch.from_numpy(m)[None, None].float() for m in (a, b))
        theirs = monai.compute_hausdorff_distance(one, other, True, percentile=95, spacing=(1.5, 2.5))
        assert hd95(a, b, (1.5, 2.5)) == pytest.approx(float(theirs), rel=1e-5)
        overlap = monai.DiceMetric(include_background=True)(one, other)
        assert dice_at(one_frame(a), one_frame(b), [0])[0, 0] == pytest.approx(float(overlap))


def test_dice_is_that_of_monai_on_random_masks_with_empty_classes() -> None:
    """A class in neither mask has none here, and 1 there."""
    monai = pytest.importorskip("monai.metrics", reason="MONAI is no dependency; closed forms are tested above")
    import torch

    rng, empty = np.random.default_rng(1), [0, 0, 0]
    for _ in range(30):
        drawn = [rng.choice(rng.choice(6, rng.integers(1, 7), replace=False), (3, 1, 9, 8)) for _ in range(2)]
        truth, predicted = (one.astype(np.uint8) for one in drawn)
        ours = dice_at(truth, predicted, [0])[0]
        one_hot = [torch.from_numpy(one[None, ..., None] == np.arange(6)).movedim(-1, 1).float() for one in drawn]
        theirs = monai.compute_dice(one_hot[1], one_hot[0], include_background=False, ignore_empty=False)[0].numpy()
        there = np.array([[(one == value).any() for value in CLASSES] for one in drawn])
        np.testing.assert_array_equal(np.isnan(ours), ~there.any(0))
        np.testing.assert_allclose(ours[there.any(0)], theirs[there.any(0)], rtol=1e-6)
        for kind, seen in enumerate((there.all(0), there[0] & ~there[1], ~there.any(0))):
            empty[kind] += int(seen.sum())
    assert min(empty) > 10, "both have it, one of them, neither"


def test_views_of_atria_alone_have_phases_too() -> None:
    """As in UK Biobank's long axes: the atrium is smallest at end-diastole."""
    truth = np.zeros((1, 4, 8, 8), np.uint8)
    for frame, size in enumerate((2, 4, 6, 3)):
        truth[:, frame, :size, :4] = LA
        truth[:, frame, :2, 6:] = RA
    assert extreme_frames(truth) == (0, 2)
    scores = mask_scores({"lax_4ch": Pair(truth, truth, (LA, RA), SPACING)})
    assert [scores[f"dice_{name}_{phase}"] for name in ("la", "ra") for phase in ("ed", "es")] == [1.0] * 4
    nothing = mask_distances({"lax_4ch": Pair(truth, np.zeros_like(truth), (LA, RA), SPACING)})
    assert [nothing[f"missed_{name}_{phase}"] for name in ("la", "ra") for phase in ("ed", "es")] == [1.0] * 4


def test_a_frame_in_which_the_cavity_alone_is_drawn_scores_the_cavity() -> None:
    """As in the Sunnybrook data: at end-systole the outer contour is not drawn, so neither is the background."""
    whole = np.zeros((1, 2, 8, 8), np.uint8)
    whole[:, 0, 1:7, 1:7] = LV_MYOCARDIUM
    whole[:, 0, 2:6, 2:6] = LV_CAVITY
    whole[:, 1, 2:7, 2:7] = LV_MYOCARDIUM
    whole[:, 1, 3:5, 3:5] = LV_CAVITY
    truth = whole.copy()
    truth[:, 1][truth[:, 1] != LV_CAVITY] = UNLABELLED
    assert extreme_frames(truth) == (0, 1)
    own = mask_scores({"sax": Pair(truth, whole, (LV_CAVITY, LV_MYOCARDIUM))})
    assert own["dice_lv_cavity_es"] == 1.0
    assert np.isnan(own["dice_lv_myocardium_es"]), "nothing is known of it, so nothing of it counts as found"
    everywhere = mask_scores({"sax": Pair(truth, np.full_like(whole, LV_CAVITY), (LV_CAVITY, LV_MYOCARDIUM))})
    assert everywhere["dice_lv_cavity_es"] == 2 * 4 / (4 + 64)
    missed = np.where(whole == LV_CAVITY, 0, whole)
    assert mask_scores({"sax": Pair(truth, missed, (LV_CAVITY, LV_MYOCARDIUM))})["dice_lv_cavity_es"] == 0.0
    assert contour_distance(truth, missed, [1], SPACING, (LV_CAVITY,)).missed[0, LV_CAVITY - 1] == 1


def test_the_second_of_two_labelled_frames_may_show_the_cavity_in_fewer_slices() -> None:
    truth = np.full((3, 5, 8, 8), UNLABELLED, np.uint8)
    truth[:, 1] = truth[:2, 3] = 0
    truth[:, 1, :4], truth[:2, 3, :2] = LV_CAVITY, LV_CAVITY
    assert extreme_frames(truth) == (1, 3)


def test_one_labelled_frame_has_no_end_systole() -> None:
    truth = np.full((1, 3, 8, 8), UNLABELLED, np.uint8)
    truth[:, 1] = 0
    truth[:, 1, :4] = LV_CAVITY
    scores = mask_scores({"sax": Pair(truth, np.where(truth == UNLABELLED, 0, truth))})
    assert (scores["dice_lv_cavity_ed"], np.isnan(scores["dice_lv_cavity_es"])) == (1.0, True)
    counts = mask_distances({"sax": Pair(truth, np.zeros_like(truth), None, SPACING)})
    assert (counts["missed_lv_cavity_ed"], np.isnan(counts["missed_lv_cavity_es"])) == (1.0, True)
