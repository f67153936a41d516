"""Figures of tasks: what they draw is what they were given."""

from __future__ import annotations

import numpy as np
import pytest

from kmtr.metrics import agreement
from kmtr.report import figures_tasks
from kmtr.report.figures_tasks import Agreed, Tile
from kmtr.report.html import png
from kmtr.types import UNLABELLED, InputError


def ring(n: int = 32, radius: float = 6.0) -> np.ndarray:
    """Classes ``y x``: a cavity in its myocardium, at y = 12, x = 18."""
    y, x = np.mgrid[:n, :n]
    from_centre = np.hypot(y - 12, x - 18)
    return np.select([from_centre < radius, from_centre < radius + 3], [1, 2], 0).astype(np.uint8)


def test_agreement_has_identity_and_bland_altman_in_units() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(150, 30, 20)
    predicted = truth + rng.normal(5, 10, 20)
    truth[3] = np.nan
    figure = figures_tasks.agreements([Agreed("lvedv", "mL", truth, predicted)], "R = 4")
    scatter, bland = (axes for axes in figure.axes if axes.get_visible())
    assert (scatter.get_xlabel(), scatter.get_ylabel()) == ("true (mL)", "predicted (mL)")
    assert bland.get_ylabel() == "predicted − true (mL)"
    points = bland.collections[0].get_offsets().data
    known = np.isfinite(truth)
    np.testing.assert_allclose(points[:, 1], (predicted - truth)[known])
    np.testing.assert_allclose(points[:, 0], (predicted + truth)[known] / 2)
    found = agreement(truth, predicted, 150.0)
    lines = [line.get_ydata()[0] for line in bland.lines]
    np.testing.assert_allclose(lines, [0, found.bias, *found.limits])
    identity = scatter.lines[0].get_xydata()
    np.testing.assert_array_equal(identity[:, 0], identity[:, 1])
    assert scatter.get_xlim() == scatter.get_ylim()
    assert png(figure)[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="at least one phenotype"):
        figures_tasks.agreements([], "")


def test_constant_predictions_are_drawn() -> None:
    png(figures_tasks.agreements([Agreed("lvef", "%", np.full(5, 50.0), np.full(5, 50.0))], "R = 4"))


def test_the_roc_of_a_perfect_score_goes_through_the_corner() -> None:
    truth = np.array([0.0, 1, 0, 1, np.nan])
    figure = figures_tasks.roc_curves({"dcm": {"R = 4: 1.00": (truth, truth.copy()), "R = 8": (truth, 1 - truth)}})
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [[0, 0], [0, 1], [1, 1]])
    np.testing.assert_allclose(axes.lines[2].get_xydata(), [[0, 0], [1, 0], [1, 1]])
    assert [text.get_text() for text in axes.get_legend().texts] == ["R = 4: 1.00", "R = 8"]


def test_overlays_show_the_surroundings_of_what_is_contoured() -> None:
    truth, predicted = ring(), ring(radius=5)
    tile = Tile(truth.astype(float), truth, predicted)
    bare = Tile(truth.astype(float), np.full_like(truth, UNLABELLED), np.zeros_like(truth))
    figure = figures_tasks.overlays(
        {"subject 1, ED": {"base": tile, "4ch": bare}, "subject 1, ES": {"base": tile}}, "R"
    )
    first, second, _, empty = figure.axes
    assert len(first.collections) == 4  # cavity and myocardium, true and predicted
    assert not second.collections
    assert not empty.images
    low, high = first.get_xlim()
    assert low <= 18 - 9 - 5
    assert high >= 18 + 9 + 4  # the image ends at 31.5
    assert high - low == pytest.approx(abs(np.subtract(*first.get_ylim())))
    assert [text.get_text() for text in figure.legends[0].texts] == ["lv cavity", "lv myocardium", "true", "predicted"]
    png(figure)


def test_the_window_stays_in_the_image() -> None:
    corner = np.zeros((20, 30), np.uint8)
    corner[:3, 27:] = 1
    y, x = figures_tasks.window(corner)
    assert (y, x) == (slice(0, 15), slice(15, 30))
    assert figures_tasks.window(np.zeros((20, 30), np.uint8)) == (slice(0, 20), slice(0, 30))


def test_volume_curves_leave_gaps_where_nothing_is_known() -> None:
    true = np.array([150.0, np.nan, 60.0])
    figure = figures_tasks.volume_curves({"subject 1": {"true masks": true, "R = 4": true - 5}}, "LV")
    (axes,) = figure.axes
    assert axes.get_ylabel() == "LV volume (mL)"
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), true)
    png(figure)


def test_images_share_one_window_and_the_error_is_that_of_the_last() -> None:
    full = ring().astype(float)
    rows = {f"R = {r}": {"zero-filled": 0.5 * full, "predicted": 0.9 * full} for r in (4, 8)}
    figure = figures_tasks.image_panel(rows, full, "Held-out subject 1")
    assert len(figure.axes) == 8
    assert len({image.get_clim() for axes in figure.axes for image in axes.images}) == 1
    np.testing.assert_allclose(figure.axes[3].images[0].get_array(), 5 * 0.1 * full)
    assert [axes.get_title() for axes in figure.axes[:4]] == [
        "fully sampled",
        "zero-filled",
        "predicted",
        "error × 5",
    ]
    png(figure)


def test_each_system_has_its_error_below_its_image() -> None:
    full = ring().astype(float)
    rows = {"R = 4": {"zero-filled": 0.5 * full, "k-MTR": 0.9 * full}, "R = 8": {"k-MTR": 0.8 * full}}
    figure = figures_tasks.image_rows(rows, full, "Reconstruction")
    grid = np.array(figure.axes).reshape(4, 3)
    assert [axes.get_title() for axes in grid[0]] == ["fully sampled", "zero-filled", "k-MTR"]
    assert [bool(axes.images) for axes in grid[2]] == [True, False, True], "a place without an image stays empty"
    np.testing.assert_allclose(grid[1, 2].images[0].get_array(), 5 * 0.1 * full)
    np.testing.assert_allclose(grid[3, 2].images[0].get_array(), 5 * 0.2 * full)
    assert len({image.get_clim() for axes in figure.axes for image in axes.images}) == 1
    png(figure)
    with pytest.raises(InputError, match="at least one row"):
        figures_tasks.image_rows({}, full, "")


def test_clouds_have_a_colour_for_each_group() -> None:
    points, low = np.arange(12.0).reshape(4, 3), np.array([True, False, True, False])
    figure = figures_tasks.clouds(
        {"before": points, "after": -points}, {"LVEF": {"low": low, "high": ~low}}, "Embeddings"
    )
    assert [axes.get_title() for axes in figure.axes] == ["before", "after"]
    assert [len(cloud.get_offsets()) for cloud in figure.axes[0].collections] == [2, 2]
    assert [text.get_text() for text in figure.subfigs[0].legends[0].texts] == ["low", "high"]
    png(figure)
