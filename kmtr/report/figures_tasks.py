"""Figures of tasks: agreement of phenotypes, ROC of diseases, contours, volume curves, reconstructed images.

Arrays in, Figure out; no pyplot, no window system, nothing global.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from kmtr.metrics import agreement, roc
from kmtr.report.contact import CLASS_COLOURS
from kmtr.report.style import COLOURS, INK, LARGE, NORMAL, SMALL, clean
from kmtr.types import SEGMENTATION_CLASSES, UNLABELLED, InputError

GREY = "#9aa4b0"
GAIN = 5
"""Errors of images are shown this many times brighter."""


@dataclass(frozen=True)
class Agreed:
    """Predictions of one phenotype: name, unit, and both arrays ``subject`` (NaN: left out)."""

    name: str
    unit: str
    truth: Float[np.ndarray, " subject"]
    predicted: Float[np.ndarray, " subject"]


def agreements(phenotypes: Sequence[Agreed], title: str) -> Figure:
    """Predicted against true with the line of identity, and below it Bland-Altman, of each phenotype in its unit.

    Raises:
        InputError: no phenotype.
    """
    if not phenotypes:
        raise InputError("agreements: expected at least one phenotype, got none")
    columns = min(4, len(phenotypes))
    lines = -(-len(phenotypes) // columns)
    figure = Figure(figsize=(max(2.75 * columns, 5.0), 4.9 * lines + 0.4), layout="constrained")
    grid = figure.subplots(2 * lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for place, one in enumerate(phenotypes):
        line, column = divmod(place, columns)
        known = np.isfinite(one.truth) & np.isfinite(one.predicted)
        for axes, draw in zip(grid[2 * line : 2 * line + 2, column], (_identity, _bland_altman), strict=True):
            axes.set_visible(True)
            clean(axes)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            if known.any():
                draw(axes, one.truth[known], one.predicted[known], one.unit)
        grid[2 * line, column].set_title(one.name, fontsize=NORMAL, color=INK, fontweight="bold")
    figure.suptitle(title, fontsize=LARGE, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure


def _identity(axes: Any, truth: np.ndarray, predicted: np.ndarray, unit: str) -> None:
    low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
    margin = 0.06 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color=GREY, linewidth=1)
    axes.scatter(truth, predicted, s=9, alpha=0.5, color=COLOURS[0], linewidths=0)
    axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel=f"true ({unit})", ylabel=f"predicted ({unit})")
    found = agreement(truth, predicted, float(truth.mean()))
    r = f"r = {found.pearson:.2f}, ".replace("-", "−") if np.isfinite(found.pearson) else ""
    axes.text(0.04, 0.97, f"{r}n = {found.subjects}", transform=axes.transAxes, va="top", fontsize=SMALL - 1, color=INK)


def _bland_altman(axes: Any, truth: np.ndarray, predicted: np.ndarray, unit: str) -> None:
    """Error against the mean of both, with bias and 95 % limits of agreement.

    Source: Bland and Altman, Lancet 327:307, 1986.
    """
    found = agreement(truth, predicted, float(truth.mean()))
    mean, error = (truth + predicted) / 2, predicted - truth
    axes.axhline(0, color=GREY, linewidth=1)
    axes.scatter(mean, error, s=9, alpha=0.5, color=COLOURS[0], linewidths=0)
    axes.set(xlabel=f"mean of true and predicted ({unit})", ylabel=f"predicted − true ({unit})")
    if not np.isfinite(found.bias):
        return
    spread = max(found.limits[1] - found.limits[0], 1e-9)
    low, high = min(error.min(), found.limits[0]), max(error.max(), found.limits[1])
    axes.set_ylim(low - 0.12 * spread, high + 0.15 * spread)
    for value, style in ((found.bias, "-"), (found.limits[0], "--"), (found.limits[1], "--")):
        axes.axhline(value, color=COLOURS[1], linewidth=1, linestyle=style)
        axes.annotate(
            f"{value:+.1f}".replace("-", "−"),
            (1, value),
            (-1, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=SMALL - 1,
            color=COLOURS[1],
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5},
        )


def roc_curves(
    panels: Mapping[str, Mapping[str, tuple[Float[np.ndarray, " subject"], Float[np.ndarray, " subject"]]]],
) -> Figure:
    """Receiver operating characteristic of each disease: a panel per disease, a curve per condition.

    Args:
        panels: disease -> text of the legend (R, AUROC with its interval) -> truth (0, 1, NaN) and score.
    """
    if not panels:
        raise InputError("roc_curves: expected at least one disease, got none")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (disease, curves) in zip(grid.flat, panels.items(), strict=False):
        clean(axes)
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":")
        for (said, (truth, score)), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
            axes.plot(*roc(truth, score), color=colour, linewidth=1.4, label=said)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.set(xlabel="1 − specificity", ylabel="sensitivity")
        axes.set_title(disease, fontsize=NORMAL, color=INK, fontweight="bold")
        axes.legend(frameon=False, fontsize=SMALL - 1.5, loc="lower right", title="AUROC", title_fontsize=SMALL - 1.5)
    return figure


# ------------------------------------------------------------------------------------------------ masks


@dataclass(frozen=True)
class Tile:
    """One slice and frame: magnitude image, true and predicted classes, all ``y x``."""

    image: Float[np.ndarray, "y x"]
    truth: Integer[np.ndarray, "y x"]
    predicted: Integer[np.ndarray, "y x"]


def overlays(rows: Mapping[str, Mapping[str, Tile]], title: str) -> Figure:
    """True (solid) and predicted (dashed) contours on images: a row per subject and phase, a column per slice.

    Each tile has its own window, [0, 99.5th percentile], and shows the surroundings of what is contoured in its column
    of that subject.

    Args:
        rows: text at the left -> name of the slice -> what is shown.
    """
    names = list(dict.fromkeys(name for tiles in rows.values() for name in tiles))
    if not names:
        raise InputError("overlays: expected at least one slice, got none")
    size, left = 1.75, 0.75
    figure = Figure(
        figsize=(size * len(names) + left, size * len(rows) + 0.95),
        layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0),
    )
    grid = figure.subplots(len(rows), len(names), squeeze=False)
    for row, (label, tiles) in enumerate(rows.items()):
        for column, name in enumerate(names):
            axes = grid[row, column]
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if not row:
                axes.set_title(name, fontsize=NORMAL, color=INK)
            if not column:
                axes.set_ylabel(wrapped(label), fontsize=SMALL, color=INK)
            if name in tiles:
                _show_tile(axes, tiles[name])
    shown = {value for tiles in rows.values() for tile in tiles.values() for value in np.unique(tile.truth).tolist()}
    handles = [
        Line2D([], [], color=colour, linewidth=2.5, label=SEGMENTATION_CLASSES[value].replace("_", " "))
        for value, colour in CLASS_COLOURS.items()
        if value in shown
    ]
    handles += [Line2D([], [], color=INK, linewidth=1.1, linestyle=s, label=n) for s, n in (("-", "true"), _DASHED)]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=SMALL, frameon=False)
    figure.suptitle(title, fontsize=LARGE, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure


_DASHED = ((0, (1.6, 1.2)), "predicted")


def _show_tile(axes: Any, tile: Tile) -> None:
    top = max(float(np.percentile(tile.image, 99.5)), 1e-30)
    axes.imshow(tile.image, cmap="gray", vmin=0, vmax=top, interpolation="bicubic")
    for mask, style in ((tile.truth, "-"), (tile.predicted, _DASHED[0])):
        for value, colour in CLASS_COLOURS.items():
            inside = mask == value
            if inside.any() and not inside.all():
                axes.contour(inside.astype(float), levels=[0.5], colors=[colour], linewidths=1.1, linestyles=[style])
    y, x = window(tile.truth, tile.predicted)
    axes.set(xlim=(x.start - 0.5, x.stop - 0.5), ylim=(y.stop - 0.5, y.start - 0.5))


def window(*masks: Integer[np.ndarray, "y x"], margin: int = 6) -> tuple[slice, slice]:
    """Square about all that masks contour, with a margin in pixels, within the image; the whole of it without any."""
    inside = np.any([(mask > 0) & (mask != UNLABELLED) for mask in masks], axis=0)
    ny, nx = inside.shape
    if not inside.any():
        return slice(0, ny), slice(0, nx)
    found = []
    bounds = [np.flatnonzero(inside.any(axis)) for axis in (1, 0)]
    side = max(int(np.ptp(each)) for each in bounds) + 1 + 2 * margin
    for each, size in zip(bounds, (ny, nx), strict=True):
        length = min(side, size)
        start = int(np.clip((each[0] + each[-1] + 1 - length) // 2, 0, size - length))
        found.append(slice(start, start + length))
    return found[0], found[1]


def volume_curves(panels: Mapping[str, Mapping[str, Float[np.ndarray, " t"]]], structure: str) -> Figure:
    """Volume over the cycle: a panel per subject, true in black, predictions in colours.

    Args:
        panels: subject -> curve -> volume in mL of every frame, NaN where unknown; the first curve is the truth.
        structure: whose volume.
    """
    if not panels:
        raise InputError("volume_curves: expected at least one subject, got none")
    figure = Figure(figsize=(3.1 * len(panels) + 0.3, 3.1), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (name, curves) in zip(grid, panels.items(), strict=True):
        clean(axes)
        for number, (label, curve) in enumerate(curves.items()):
            style = (INK, "o") if not number else (COLOURS[(number - 1) % len(COLOURS)], None)
            at = np.arange(1, len(curve) + 1)
            axes.plot(at, curve, color=style[0], marker=style[1], markersize=3.5, linewidth=1.4, label=label)
        axes.set_title(name, fontsize=NORMAL, color=INK, fontweight="bold")
        axes.set_xlabel("frame of the cycle")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y", color="#e3e7eb", linewidth=0.7)
    grid[0].set_ylabel(f"{structure} volume (mL)")
    grid[0].set_ylim(bottom=0)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=SMALL)
    return figure


# ------------------------------------------------------------------------------------------------ images


def image_rows(
    rows: Mapping[str, Mapping[str, Float[np.ndarray, "y x"]]], full: Float[np.ndarray, "y x"], title: str
) -> Figure:
    """Fully sampled image beside what several systems make of fewer lines, and below each its error: two rows per
    condition.

    All images share one window, [0, 99.7th percentile of the fully sampled one]; errors are shown `GAIN` times
    brighter.

    Args:
        rows: text at the left -> name -> image; a name that a row lacks leaves its place empty.
    """
    names = list(dict.fromkeys(name for images in rows.values() for name in images))
    if not names:
        raise InputError("image_rows: expected at least one row with one image, got none")
    style = {"vmin": 0, "vmax": max(float(np.percentile(full, 99.7)), 1e-30), "interpolation": "nearest"}
    wide, high = 1.75, 1.75 * full.shape[0] / full.shape[1]
    figure = Figure(
        figsize=(wide * (len(names) + 1) + 0.4, 2 * high * len(rows) + 0.95),
        layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0),
    )
    grid = figure.subplots(2 * len(rows), len(names) + 1, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for place, (label, images) in enumerate(rows.items()):
        above, below = grid[2 * place], grid[2 * place + 1]
        above[0].imshow(full, cmap="gray", **style)
        above[0].set_ylabel(label, fontsize=SMALL, color=INK)
        below[0].set_ylabel(f"error × {GAIN}", fontsize=SMALL, color=INK)
        for column, name in enumerate(names, 1):
            if name in images:
                above[column].imshow(images[name], cmap="gray", **style)
                below[column].imshow(GAIN * np.abs(images[name] - full), cmap="inferno", **style)
    for axes, name in zip(grid[0], ("fully sampled", *names), strict=True):
        axes.set_title(wrapped(name), fontsize=SMALL, color=INK)
    figure.suptitle(title, fontsize=LARGE, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure


def wrapped(name: str, width: int = 20) -> str:
    """A long name in lines that fit above or beside a tile."""
    return textwrap.fill(name, width)


def clouds(
    panels: Mapping[str, Float[np.ndarray, "subject 3"]],
    groups: Mapping[str, Mapping[str, Bool[np.ndarray, " subject"]]],
    title: str,
) -> Figure:
    """Points in three dimensions, a column per embedding, a row per grouping and a colour per group, which are in
    order; points of no group are left out.

    Args:
        groups: grouping -> group -> who is in it.
    """
    if not panels or not groups:
        raise InputError("clouds: expected at least one embedding and one grouping, got none")
    figure = Figure(figsize=(4.4 * len(panels), 0.4 + 3.9 * len(groups)), layout="constrained")
    parts = figure.subfigures(len(groups), 1, squeeze=False)[:, 0]
    for part, of in zip(parts, groups.values(), strict=True):
        row = part.subplots(1, len(panels), squeeze=False, subplot_kw={"projection": "3d"})[0]
        for axes, (name, points) in zip(row, panels.items(), strict=True):
            for colour, (group, inside) in zip(ordered(len(of)), of.items(), strict=True):
                axes.scatter(*points[inside].T, s=10, color=colour, alpha=0.75, linewidths=0, label=group)
            axes.set_title(name, fontsize=NORMAL, color=INK, fontweight="bold")
            axes.tick_params(labelbottom=False, labelleft=False, labelright=False, labeltop=False)
        handles, names = row[0].get_legend_handles_labels()
        part.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=SMALL)
    figure.suptitle(title, fontsize=LARGE, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure


def ordered(count: int) -> list[str]:
    """So many colours in an order that the eye sees, dark to bright."""
    return [to_hex(colormaps["viridis"](place)) for place in np.linspace(0.05, 0.9, count)]


def image_panel(
    rows: Mapping[str, Mapping[str, Float[np.ndarray, "y x"]]], full: Float[np.ndarray, "y x"], title: str
) -> Figure:
    """Fully sampled image, what is made of fewer lines, and the error of the last: a row per condition.

    All images share one window, [0, 99.7th percentile of the fully sampled one]; the error is shown `GAIN` times
    brighter.

    Args:
        rows: text at the left -> name -> image, the same names in each row; the last one is the prediction.
    """
    if not rows or not all(rows.values()):
        raise InputError("image_panel: expected at least one row with one image, got none")
    names = list(next(iter(rows.values())))
    style = {"vmin": 0, "vmax": max(float(np.percentile(full, 99.7)), 1e-30), "interpolation": "nearest"}
    wide, high = 2.0, 2.0 * full.shape[0] / full.shape[1]
    figure = Figure(
        figsize=(wide * (len(names) + 2) + 0.4, high * len(rows) + 0.65),
        layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0),
    )
    grid = figure.subplots(len(rows), len(names) + 2, squeeze=False)
    titles = ("fully sampled", *names, f"error × {GAIN}")
    for axes, (label, images) in zip(grid, rows.items(), strict=True):
        last = images[names[-1]]
        for place, image in enumerate((full, *images.values(), GAIN * np.abs(last - full))):
            axes[place].imshow(image, cmap="gray" if place <= len(names) else "inferno", **style)
            axes[place].set(xticks=[], yticks=[])
            axes[place].spines[:].set_visible(False)
        axes[0].set_ylabel(label, fontsize=SMALL, color=INK)
    for axes, name in zip(grid[0], titles, strict=True):
        axes.set_title(name, fontsize=NORMAL, color=INK)
    figure.suptitle(title, fontsize=LARGE, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure
