"""Looking at a dataset: a contact sheet of subjects over the cardiac cycle, and histograms of its labels.

Pure functions: arrays and studies in, Figure out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kmtr.physics.fourier import ifft2c
from kmtr.types import COVARIATES, DISEASES, LABELS, PHENOTYPES, SEGMENTATION_CLASSES, UNLABELLED, VIEWS, Study, View

CLASS_COLOURS = {1: "#ffd166", 2: "#06d6a0", 3: "#4cc9f0", 4: "#f78c6b", 5: "#c77dff"}
"""Colours of the outlines, by segmentation value: bright on grey, and told apart without green against red."""

SEXES = (("female", 0.0, "#d1495b"), ("male", 1.0, "#0b5cad"))

FRAMES = 6
"""Columns of a subject's block, beside the profile over time."""
SAX_ROWS = 3
_GAP, _SMALL, _NORMAL, _INK = 0.04, 7, 9, "#1b1f24"


def contact_sheet(studies: Sequence[tuple[str, Study]], title: str) -> Figure:
    """Subjects side by side: a row for each slice shown, frames from left to right, masks as outlines.

    The last column follows one image row (dashed in the first frame) through the cycle: contraction is a wave there,
    noise and ghosts are not. Each slice has its own window, [0, 99.5th percentile over its frames]. Of multi-coil data
    the root of the sum of squares is shown, of undersampled data the zero-filled image.

    Args:
        studies: (split, study) of each subject.
    """
    blocks = [(split, study, _slices(study)) for split, study in studies]
    across = min(2, len(blocks))
    down = math.ceil(len(blocks) / across)
    rows = max(len(slices) for _, _, slices in blocks)
    tile = 1.2  # inches
    size = (across * (FRAMES + 1.6) * tile + 0.3, down * (rows * tile + 0.45) + 0.75)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11, color=_INK, x=0.01, ha="left", fontweight="bold")
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (split, study, slices) in zip(grid.flat, blocks, strict=False):
        _block(axes, study, slices, rows)
        axes.set_title(_caption(split, study), fontsize=_NORMAL, color=_INK, loc="left")
    drawn = [Line2D([], [], color=c, label=SEGMENTATION_CLASSES[n].replace("_", " ")) for n, c in CLASS_COLOURS.items()]
    figure.legend(handles=drawn, loc="upper right", ncols=len(drawn), fontsize=_SMALL, frameon=False)
    return figure


def histograms(
    labels: np.ndarray,
    title: str,
    reference: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> Figure:
    """Distribution of every known phenotype and covariate, by sex: filled the healthy, as a line everybody.

    Args:
        labels: float ``subject label`` in the order of LABELS, NaN = unknown. Healthy: no disease that is known.
        reference: label -> {"male": (mean, SD), "female": (mean, SD)} of healthy adults; drawn above the bars as a dot
            with one and two SD. None: no such values.
    """
    of = {name: labels[:, column] for column, name in enumerate(LABELS)}
    shown = [n for n in LABELS if n not in (*DISEASES, "male") and np.isfinite(of[n]).sum() > 1]
    sick = np.any([of[name] == 1 for name in DISEASES], axis=0)
    across = 5
    down = max(1, math.ceil(len(shown) / across))
    figure = Figure(figsize=(across * 2.7, down * 1.9 + 0.7), layout="constrained")
    figure.suptitle(title, fontsize=11, color=_INK, x=0.01, ha="left", fontweight="bold")
    grid = figure.subplots(down, across, squeeze=False)
    groups = [(name, of["male"] == value, colour) for name, value, colour in SEXES]
    if np.isnan(of["male"]).any():
        groups.append(("sex unknown", np.isnan(of["male"]), "#5b6470"))
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, name in zip(grid.flat, shown, strict=False):
        _histogram(axes, of[name], sick, groups, (reference or {}).get(name, {}))
        axes.set_title(title_of(name), fontsize=_NORMAL, color=_INK)
    handles = [Line2D([], [], color=colour, linewidth=5, alpha=0.5, label=name) for name, _, colour in groups]
    handles.append(Line2D([], [], color="#5b6470", linewidth=1, label="with the sick"))
    if reference:
        handles.append(Line2D([], [], color="#5b6470", marker="o", markersize=4, label="reference, 1 and 2 SD"))
    figure.legend(handles=handles, loc="upper right", ncols=len(handles), fontsize=_SMALL, frameon=False)
    return figure


# -------------------------------------------------------------------------------------------------- contact sheet


def _slices(study: Study) -> list[tuple[str, int]]:
    """(view, slice) of every row: short axis at up to three levels, long axes once."""
    found = []
    for view in VIEWS:
        if view not in study.views:
            continue
        count = len(study.views[view].kspace)
        if view == "sax":
            levels = min(SAX_ROWS, count)
            found += [(view, round((n + 0.5) * count / levels - 0.5)) for n in range(levels)]
        else:
            found.append((view, count // 2))
    return found


def _block(axes: Any, study: Study, slices: Sequence[tuple[str, int]], rows: int) -> None:
    """One subject: tiles placed in one pair of axes, a unit wide and high each."""
    for row, (name, number) in enumerate(slices):
        view = study.views[name]
        image = _image(view, number)
        top = max(float(np.percentile(image, 99.5)), 1e-30)
        style = {"cmap": "gray", "vmin": 0, "vmax": top, "interpolation": "bicubic"}
        frames, ny, nx = image.shape
        chosen, outlined = _frames(view, number)
        y, half = -row - 0.5, 0.5 - _GAP / 2
        pixel_y, pixel_x = view.spacing_mm[1:] if view.spacing_mm else (1.0, 1.0)
        long = max(ny * pixel_y, nx * pixel_x)
        high, wide = half * ny * pixel_y / long, half * nx * pixel_x / long
        middle = _row_of_motion(image)
        for column, frame in enumerate(chosen):
            x = column + 0.5
            box = (x - wide, x + wide, y - high, y + high)
            axes.imshow(image[frame], **style, extent=box, origin="upper")
            if frame in outlined and view.segmentation is not None:
                _outlines(axes, view.segmentation[number, frame], box)
            said = f"{1000 * frame * view.frame_time_s:.0f} ms" if view.frame_time_s else f"frame {frame}"
            axes.text(x - half, y + half, said, fontsize=5, color="#ffd166", ha="left", va="top")
            if not column and frames > 1:
                at = y + high - 2 * high * (middle + 0.5) / ny
                axes.plot([box[0], box[1]], [at, at], color="#ffd166", linewidth=0.5, linestyle=(0, (4, 3)))
        if frames > 1:
            left = FRAMES + 0.05
            box = (left, left + 1 - _GAP, y - wide, y + wide)
            axes.imshow(image[:, middle].T, **style, extent=box, origin="lower")
        count = len(view.kspace)
        label = f"{name.replace('lax_', '')}" + (f"\n{number + 1}/{count}" if count > 1 else "")
        if view.sampled is not None:
            label += f"\nR {view.sampled.size / max(int(view.sampled.sum()), 1):.1f}"
        axes.text(-0.04, y, label, fontsize=_SMALL, color=_INK, ha="right", va="center")
    axes.set(xlim=(-0.45, FRAMES + 1.1), ylim=(-rows, 0), aspect="equal")


def _image(view: View, number: int) -> np.ndarray:
    """Magnitude ``t y x`` of one slice, coils combined by the root of the sum of squares."""
    return np.sqrt((np.abs(ifft2c(view.kspace[number])) ** 2).sum(0))


def _row_of_motion(image: np.ndarray) -> int:
    """y of the centre of what moves: the tenth of the pixels that change most over time."""
    motion = image.std(0)
    motion = np.clip(motion - np.percentile(motion, 90), 0, None).sum(1)
    return round(float(np.average(np.arange(len(motion)), weights=motion))) if motion.any() else len(motion) // 2


def _frames(view: View, number: int) -> tuple[list[int], set[int]]:
    """Frames shown of a slice, and those of them with outlines.

    Where all frames are contoured, every second one shows the bare image; where few are (end-diastole and end-systole,
    as a rule), those are among the ones shown.
    """
    frames = view.kspace.shape[2]
    even = sorted({round(frame) for frame in np.linspace(0, frames, min(FRAMES, frames), endpoint=False)})
    if view.segmentation is None:
        return even, set()
    contoured = np.flatnonzero((view.segmentation[number] != UNLABELLED).any((1, 2))).tolist()
    if len(contoured) == frames:
        return even, set(even[1::2]) or set(even)
    contoured = contoured[:FRAMES]
    others = [frame for frame in even if frame not in contoured][: FRAMES - len(contoured)]
    return sorted([*contoured, *others]), set(contoured)


def _outlines(axes: Any, classes: np.ndarray, box: tuple[float, float, float, float]) -> None:
    ny, nx = classes.shape
    x = box[0] + (np.arange(nx) + 0.5) / nx * (box[1] - box[0])
    y = box[3] - (np.arange(ny) + 0.5) / ny * (box[3] - box[2])
    for value, colour in CLASS_COLOURS.items():
        inside = classes == value
        if inside.any() and not inside.all():
            axes.contour(x, y, inside.astype(float), levels=[0.5], colors=[colour], linewidths=0.6)


def _caption(split: str, study: Study) -> str:
    known = study.labels
    said = [study.subject_id, split]
    if "male" in known:
        said.append("male" if known["male"] else "female")
    numbers = {"EF": "lvef_pct", "EDV": "lvedv_ml", "LVM": "lvm_g"}
    said += [f"{name} {known[key]:.0f}" for name, key in numbers.items() if key in known]
    return ", ".join([*said, *(name for name in DISEASES if known.get(name) == 1)])


# -------------------------------------------------------------------------------------------------- histograms


def title_of(name: str) -> str:
    """A label as a person reads it: ``lvedv_ml`` -> ``lvedv (mL)``; names without unit without one."""
    unit = (PHENOTYPES | COVARIATES).get(name, "")
    endings = {"mL": "_ml", "%": "_pct", "L/min": "_l_min", "g": "_g", "mm": "_mm"}
    endings |= {"years": "_y", "m2": "_m2", "1/min": "_bpm"}
    return name.removesuffix(endings.get(unit, "")).replace("_", " ") + (f" ({unit})" if unit else "")


def _histogram(
    axes: Any,
    values: np.ndarray,
    sick: np.ndarray,
    groups: Sequence[tuple[str, np.ndarray, str]],
    reference: Mapping[str, tuple[float, float]],
) -> None:
    known = np.isfinite(values)
    low, high = np.percentile(values[known], (0.5, 99.5))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    bins = np.linspace(low, high, min(30, max(8, int(known.sum() ** 0.5))) + 1)
    for _, members, colour in groups:
        healthy = values[known & members & ~sick]
        everybody = values[known & members]
        if everybody.size:
            axes.hist(healthy, bins, color=colour, alpha=0.4)
            axes.hist(everybody, bins, color=colour, histtype="step", linewidth=0.9)
    top = axes.get_ylim()[1]
    for place, (name, _, colour) in enumerate(groups):
        if name in reference:
            mean, sd = reference[name]
            at = top * (1.06 + 0.09 * place)
            axes.plot([mean - 2 * sd, mean + 2 * sd], [at, at], color=colour, linewidth=0.8)
            axes.plot([mean - sd, mean + sd], [at, at], color=colour, linewidth=2.2)
            axes.plot([mean], [at], color=colour, marker="o", markersize=4)
    axes.set_yticks([])
    axes.tick_params(axis="x", labelsize=_SMALL)
    axes.spines[["top", "right", "left"]].set_visible(False)
