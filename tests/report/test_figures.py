"""Figures: what they state is computed right, and they touch nothing global."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from kmtr.config import override
from kmtr.config.recipes import tiny
from kmtr.physics.fourier import fft2c, ifft2c
from kmtr.report import figures, figures_kspace
from kmtr.report.html import png
from kmtr.types import InputError


def moving_disc(frames: int = 6, n: int = 32) -> np.ndarray:
    """Complex images, ``t y x``: a disc centred at y = 20 whose radius changes."""
    y, x = np.mgrid[:n, :n]
    radius = 6 + 2 * np.cos(2 * np.pi * np.arange(frames) / frames)
    return ((y - 20) ** 2 + (x - 16) ** 2 < radius[:, None, None] ** 2) * np.exp(0.3j) + 0.1


def every_fourth_line(frames: int = 6, n: int = 32) -> np.ndarray:
    return (np.arange(n) + np.arange(frames)[:, None]) % 4 == 0


def test_reconstruction_states_true_r_and_nmse_under_one_window() -> None:
    target = moving_disc()
    kspace, sampled = fft2c(target), every_fourth_line()
    zero_filled = ifft2c(kspace * sampled[..., None])
    figure = figures_kspace.reconstruction(kspace, sampled, zero_filled, 0.9 * target, target, "disc")
    titles = [axes.get_title() for axes in figure.axes]
    expected = ((abs(zero_filled) - abs(target)) ** 2).sum() / (abs(target) ** 2).sum()
    assert titles[0] == "k-space, true R = 4.0"
    assert titles[1] == f"zero-filled, NMSE {expected:.3f}"
    assert titles[2] == "reconstruction, NMSE 0.010"
    assert len(figure.axes) == 10
    assert len({image.get_clim() for axes in [*figure.axes[1:5], *figure.axes[6:]] for image in axes.images}) == 1
    difference = figure.axes[4].images[0].get_array()
    np.testing.assert_allclose(difference.max(), 5 * 0.1 * abs(target).max(), rtol=1e-6)
    assert figure.axes[6].get_ylabel() == "x, along y = 20"  # the row of the centre of motion


def test_lines_that_the_encoder_did_not_see_are_told_apart() -> None:
    target = moving_disc()
    kspace, sampled = fft2c(target), every_fourth_line()
    hidden = sampled & (np.arange(32) < 16)
    figure = figures_kspace.reconstruction(kspace, sampled, target, target, target, "disc", hidden=hidden, frame=0)
    picture = figure.axes[0].images[0].get_array()
    grey = np.ptp(picture, axis=-1).max(axis=-1) == 0  # ky
    np.testing.assert_array_equal(grey, sampled[0] & ~hidden[0])
    np.testing.assert_allclose(
        picture[~sampled[0]], np.broadcast_to(figures_kspace.UNSAMPLED, picture[~sampled[0]].shape)
    )
    assert [text.get_text() for text in figure.axes[0].get_legend().texts] == [
        "not acquired",
        "hidden from the encoder",
    ]


def test_one_frame_has_one_row() -> None:
    target = moving_disc()[0]
    figure = figures_kspace.reconstruction(fft2c(target), np.ones(32, bool), target, target, target, "one frame")
    assert len(figure.axes) == 5
    assert figure.axes[0].get_legend() is None
    assert png(figure)[:4] == b"\x89PNG"


def test_an_empty_slice_divides_by_nothing() -> None:
    zero = np.zeros((3, 16, 16))
    with np.errstate(all="raise"):
        png(figures_kspace.reconstruction(zero, np.zeros((3, 16), bool), zero, zero, zero, "padded"))


def test_shapes_that_do_not_fit_are_refused() -> None:
    target = moving_disc()
    for kspace, sampled, zero_filled, says in (
        (target[None], every_fourth_line(), target, r"kspace: expected axes"),
        (target, every_fourth_line().T, target, r"sampled: expected \(6, 32\)"),
        (target, every_fourth_line(), target[0], r"zero_filled: expected axes t y x"),
        (target, every_fourth_line(), target[:, 1:], r"zero_filled: expected the target's shape"),
    ):
        with pytest.raises(InputError, match=says):
            figures_kspace.reconstruction(kspace, sampled, zero_filled, target, target, "x")


def test_scatter_leaves_missing_labels_out() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(100, 10, (50, 3))
    truth[:10, 1] = np.nan
    truth[:, 2] = np.nan
    predicted = np.where(np.isnan(truth), 0.0, truth + 2.0)
    figure = figures.probe_scatter(predicted, truth, ["LVEDV", "LVESV", "RVEDV"], ["mL"] * 3)
    texts = [axes.texts[0].get_text() for axes in figure.axes[:3]]
    r2 = 1 - 50 * 4 / ((truth[:, 0] - truth[:, 0].mean()) ** 2).sum()
    assert texts[0] == f"$R^2$ = {r2:.2f}\n+2.0 ± 0.0 mL\nn = 50"
    assert texts[1].endswith("n = 40")
    assert texts[2] == "no labels"
    png(figure)


def test_bars_show_score_and_interval_and_say_what_is_cut() -> None:
    table = {
        "mean": {"lvef_pct": (-3.0, -4.0, -2.0)},
        "k-MTR": {"lvef_pct": (0.8, 0.7, 0.85), "lvm_g": (0.5, 0.4, 0.6)},
    }
    figure = figures.probe_bars(table)
    (axes,) = figure.axes
    heights = [bar.get_height() for bar in axes.patches]
    np.testing.assert_array_equal(heights, [-3.0, np.nan, 0.8, 0.5])
    ends = axes.containers[3].lines[2][0].get_segments()
    np.testing.assert_allclose([end[:, 1] for end in ends], [[0.7, 0.85], [0.4, 0.6]])
    assert [text.get_text() for text in axes.texts] == ["-3"]
    assert axes.get_ylim()[0] == figures.CUT
    png(figure)


def test_curves_of_one_metric_share_a_panel() -> None:
    history = {
        "train/loss": [(20, 0.01), (0, 1.0), (10, 0.1)],
        "val/loss": [(0, 1.1), (10, float("nan"))],
        "top1": [(0, 0.5)],
    }
    figure = figures.loss_curves(history, "a run")
    assert [axes.get_title() for axes in figure.axes] == ["loss", "top1"]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), [0, 10, 20])
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]
    png(figure)


def test_nothing_to_draw_is_refused() -> None:
    for draw in (figures.probe_bars, figures.loss_curves):
        with pytest.raises(InputError, match="got none"):
            draw({})


def test_sampling_states_what_was_measured() -> None:
    changes = {"sampling.accelerations": (4, 8), "sampling.acs_lines": 4}
    config = override(tiny(), changes | {"sampling.family": "kt-gaussian-acs"})
    figure = figures_kspace.sampling(config)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert [title.partition(":")[0] for title in titles] == ["R = 4", "R = 8"]
    for title, most in zip(titles, (4, 8), strict=True):
        true_r, acs = map(float, re.search(r"true R ([\d.]+), (\d+) ACS", title).groups())
        assert most / 2 < true_r < most  # ACS lines on top
        assert acs == 4
    png(figure)


def test_sampling_of_a_file_has_one_column() -> None:
    config = override(tiny(), {"sampling.family": "file"})
    table = torch.from_numpy(every_fourth_line(6, 64))
    figure = figures_kspace.sampling(config, table)
    assert [axes.get_title() for axes in figure.axes] == ["file: true R 4.00, 0 ACS", ""]
    for wrong in ((config, None), (tiny(), table)):
        with pytest.raises(InputError, match=r"sampling\.family"):
            figures_kspace.sampling(*wrong)


def test_equal_figures_give_equal_bytes() -> None:
    def draw() -> Figure:
        return figures_kspace.sampling(tiny())

    assert png(draw()) == png(draw())


def test_no_pyplot_and_no_ray() -> None:
    program = (
        "import sys, kmtr.report.figures, kmtr.report.figures_kspace, kmtr.report.html\n"
        "print([m for m in ('matplotlib.pyplot', 'ray', 'mlflow', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
