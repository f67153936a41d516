"""Figures of k-space, sampling and images: arrays in, Figure out; no pyplot, no window system, nothing global."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from kmtr.config import RunConfig
from kmtr.physics import random
from kmtr.physics import sampling as patterns
from kmtr.report.style import COLOURS, INK, LARGE, NORMAL, SMALL, clean
from kmtr.types import InputError

UNSAMPLED = (0.10, 0.22, 0.42)
"""RGB of k-space that was not acquired: a colour, so that it can't be taken for a weak signal."""

HIDDEN = (0.95, 0.62, 0.20)
"""RGB that tints acquired k-space which masked pretraining withheld from the encoder."""


def reconstruction(
    kspace: np.ndarray,
    sampled: np.ndarray,
    zero_filled: np.ndarray,
    reconstruction: np.ndarray,
    target: np.ndarray,
    title: str,
    *,
    hidden: np.ndarray | None = None,
    frame: int | None = None,
    profile_row: int | None = None,
) -> Figure:
    """k-space, zero-filled, reconstruction, fully sampled and difference: one frame, and below it x over time.

    NMSE and true R in the titles are over all frames given.
    All images share one window, [0, 99.7th percentile of the target]; differences are shown five times brighter. The
    second row follows one image row through the cardiac cycle (and the lines sampled in each frame), where an error in
    motion shows that no single frame betrays. Without a time axis there is one row.

    Args:
        kspace: complex, ``t ky kx`` or ``ky kx``, one slice, coils combined; may be fully sampled, `sampled` hides it.
        sampled: bool, ``t ky`` or ``ky``; True = acquired.
        zero_filled, reconstruction, target: ``t y x`` or ``y x``; the magnitude is shown.
        title: of the figure; nominal acceleration and what is shown belong in it.
        hidden: bool, as `sampled`; True = acquired, but withheld from the encoder: shown in a tint of its own.
        frame: index shown in the first row; None: the one that differs most from the mean over time of the target.
        profile_row: y of the second row; None: the row of the centre of motion.

    Raises:
        InputError: shapes that do not fit.
    """
    k, kept, withheld = _lines(kspace, sampled, hidden)
    zero, recon, full = _magnitudes(
        np.shape(kspace), {"zero_filled": zero_filled, "reconstruction": reconstruction, "target": target}
    )
    moving = np.ndim(kspace) == 3
    at = frame if frame is not None else int(np.argmax(((full - full.mean(0)) ** 2).sum((1, 2))))
    row = profile_row if profile_row is not None else _centre_row(full.std(0))
    names = ("zero-filled", "reconstruction", "fully sampled", "difference × 5")
    errors = (f", NMSE {_nmse(zero, full):.3f}", f", NMSE {_nmse(recon, full):.3f}", "", "")
    shown = (zero, recon, full, 5 * np.abs(recon - full))
    styles = [
        {"cmap": cmap, "vmin": 0, "vmax": max(float(np.percentile(full, 99.7)), 1e-30), "interpolation": "nearest"}
        for cmap in ("gray", "gray", "gray", "inferno")
    ]

    figure, grid = _canvas(*full.shape[1:], moving=moving)
    figure.suptitle(title, fontsize=LARGE, color=INK, x=0.01, ha="left", fontweight="bold")
    _show_kspace(grid[0, 0], k[at], kept[at], withheld[at])
    true_r = kept.size / max(int(kept.sum()), 1)
    grid[0, 0].set_title(f"k-space, true R = {true_r:.1f}", fontsize=NORMAL, color=INK)
    for axes, name, error, image, style in zip(grid[0, 1:], names, errors, shown, styles, strict=True):
        axes.imshow(image[at], **style)
        axes.set_title(name + error, fontsize=NORMAL, color=INK)
    grid[0, 1].set_ylabel(f"frame {at + 1} of {len(full)}" if moving else "y", fontsize=SMALL)
    grid[0, 0].set_xlabel("kx (log magnitude)", fontsize=SMALL, labelpad=2)
    grid[0, 0].set_ylabel("ky", fontsize=SMALL)
    if moving:
        _show_pattern(grid[1, 0], kept, withheld, at)
        _show_profiles(grid[:, 1:], [image[:, row] for image in shown], styles, at, row)
        grid[1, 0].set_ylabel("ky", fontsize=SMALL)
        grid[1, 0].set_xlabel("frame (lines acquired)", fontsize=SMALL, labelpad=1)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def _lines(
    kspace: np.ndarray, sampled: np.ndarray, hidden: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Magnitude of k-space ``t ky kx``, acquired lines and the hidden ones among them, both ``t ky``; one frame where
    there is no time axis.
    """
    if np.ndim(kspace) not in (2, 3):
        raise InputError(f"kspace: expected axes t ky kx or ky kx, got {np.shape(kspace)}")
    k = np.abs(np.asarray(kspace).reshape((-1, *np.shape(kspace)[-2:])))
    withheld = np.zeros(np.shape(sampled), bool) if hidden is None else np.asarray(hidden, dtype=bool)
    for name, mask in (("sampled", sampled), ("hidden", withheld)):
        if np.shape(mask) != np.shape(kspace)[:-1]:
            raise InputError(f"{name}: expected {np.shape(kspace)[:-1]} like the lines of kspace, got {np.shape(mask)}")
    kept = np.asarray(sampled, dtype=bool).reshape(k.shape[:2])
    return k, kept, withheld.reshape(k.shape[:2]) & kept


def _magnitudes(like: tuple[int, ...], images: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Magnitude of each image, ``t y x``.

    Args:
        like: shape of their k-space.
        images: name -> image, the target among them.
    """
    moving = len(like) == 3
    frames, target = like[0] if moving else 1, np.shape(images["target"])
    for name, image in images.items():
        if np.ndim(image) != len(like) or (moving and len(image) != frames):
            raise InputError(
                f"{name}: expected axes {'t y x' if moving else 'y x'} of {frames} frames, got {np.shape(image)}"
            )
        if np.shape(image) != target:
            raise InputError(f"{name}: expected the target's shape {target}, got {np.shape(image)}")
    return [np.abs(np.asarray(image, dtype=complex)).reshape((-1, *np.shape(image)[-2:])) for image in images.values()]


def _canvas(ny: int, nx: int, *, moving: bool) -> tuple[Figure, np.ndarray]:
    """Figure and its axes, ``row column``: five columns of images, and a second row where something moves."""
    width, gap = 2.15, 0.08
    first, second = width * ny / nx, width * 0.62
    figure = Figure(
        figsize=(5 * width + 4 * gap + 0.35, first + (second + 0.3 if moving else 0) + 0.85),
        layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.04, wspace=0.01),
    )
    heights = [first, second] if moving else [1]
    return figure, figure.subplots(len(heights), 5, squeeze=False, height_ratios=heights)


def _show_profiles(
    grid: np.ndarray, profiles: list[np.ndarray], styles: list[dict[str, Any]], at: int, row: int
) -> None:
    """One image row over time (``t x``) below each image, and where it lies in the image.

    Args:
        grid: axes of images (first row) and of profiles (second row).
        at: frame that the images show.
        row: y of the profiles.
    """
    mark = {"color": "#ffd166", "linewidth": 0.8, "linestyle": (0, (4, 3))}
    for image, axes, profile, style in zip(*grid, profiles, styles, strict=True):
        image.axhline(row, **mark)
        axes.imshow(profile.T, aspect="auto", **style)
        axes.axvline(at, **mark)
        axes.set_xlabel("frame", fontsize=SMALL, labelpad=1)
    grid[1, 0].set_ylabel(f"x, along y = {row}", fontsize=SMALL)


def sampling(config: RunConfig, table: torch.Tensor | None = None) -> Figure:
    """Patterns of the configured family: a column for each nominal R, with one slice's pattern over its density in ky.

    The share of frames in which a line is sampled is counted in patterns as training draws them, of the configuration's
    largest matrix; true R and ACS lines in the titles are counted too.

    Args:
        table: pattern of ``sampling.family=file``, bool ``frame line``; one column, since nothing is drawn.

    Raises:
        InputError: the family is ``file`` and there is no table, or an R leaves no lines.
    """
    how, frames, lines = config.sampling, config.data.frames, config.data.matrix[0]
    if (how.family == "file") != (table is not None):
        raise InputError(f"sampling.family: expected a pattern for file and for no other family, got {how.family}")
    drawn: dict[str, torch.Tensor] = {}
    if table is not None:
        drawn["file"] = patterns.repeat(table, (1, 1, frames, table.shape[1]))
    else:
        key = torch.arange(256)
        u = random.uniform(
            config.seed, torch.zeros_like(key), key, random.PATTERN, (1, frames, lines), (0, 0, lines // 2)
        )
        for r in how.accelerations:
            patterns.check(lines, r, how.acs_lines, how.family)
            each, every = torch.full_like(key, r), torch.full_like(key, lines)
            drawn[f"R = {r}"] = patterns.pattern(u, each, every, how.acs_lines, how.family)
    figure = Figure(figsize=(0.4 + 2.6 * max(len(drawn), 2), 4.0), layout="constrained")
    grid = figure.subplots(2, len(drawn), squeeze=False, sharey="row", height_ratios=(1, 1))
    for (above, below), (name, sampled) in zip(grid.T, drawn.items(), strict=True):
        true_r, acs = float(patterns.true_acceleration(sampled)), patterns.measured_acs_lines(sampled)
        above.set_title(f"{name}: true R {true_r:.2f}, {acs} ACS", fontsize=NORMAL, color=INK)
        kept = sampled[0, 0].numpy()
        _show_pattern(above, kept, np.zeros_like(kept), None)
        above.set(xticks=[], yticks=[], xlabel="frame")
        share = sampled.double().mean((0, 1, 2)).numpy()
        ky = np.arange(len(share)) - len(share) // 2
        below.fill_between(ky, share, step="mid", color=COLOURS[0], alpha=0.85, linewidth=0)
        below.set(xlabel="ky", ylim=(0, 1.02), xlim=(ky[0], ky[-1]))
        clean(below)
        above.xaxis.label.set_size(SMALL)
    grid[0, 0].set_ylabel("ky", fontsize=SMALL)
    grid[1, 0].set_ylabel("share of frames that sample it")
    figure.suptitle(f"Sampling: {how.family}", fontsize=LARGE, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure


def _show_kspace(axes: Any, magnitude: np.ndarray, kept: np.ndarray, withheld: np.ndarray) -> None:
    """Log magnitude in grey over four decades below its peak; what was not acquired or was hidden in its own colour."""
    top = max(float(magnitude.max()), 1e-30)
    level = np.clip(1 + np.log10(np.maximum(magnitude / top, 1e-30)) / 4, 0, 1)
    picture = np.repeat(level[..., None], 3, axis=-1)
    picture[withheld] = (0.35 + 0.65 * picture[withheld]) * np.array(HIDDEN)
    picture[~kept] = UNSAMPLED
    axes.imshow(picture, interpolation="nearest")
    present = ((not kept.all(), UNSAMPLED, "not acquired"), (withheld.any(), HIDDEN, "hidden from the encoder"))
    handles = [Patch(color=colour, label=label) for there, colour, label in present if there]
    if handles:
        style = {"fontsize": SMALL - 1, "framealpha": 0.85, "borderpad": 0.3, "handlelength": 1}
        axes.legend(handles=handles, loc="lower right", **style)


def _show_pattern(axes: Any, kept: np.ndarray, withheld: np.ndarray, at: int | None) -> None:
    """Lines acquired (light) or hidden in each frame: ``t ky``, time to the right."""
    picture = np.where(kept.T[..., None], 0.96, np.array(UNSAMPLED))
    picture[withheld.T] = HIDDEN
    axes.imshow(picture, aspect="auto", interpolation="nearest")
    if at is not None:
        axes.axvline(at, color="#ffd166", linewidth=0.8, linestyle=(0, (4, 3)))


def _centre_row(motion: np.ndarray) -> int:
    """y of the centre of motion: mean row weighted by the squared standard deviation over time, ``y x``."""
    weight = (motion**2).sum(1)
    total = float(weight.sum())
    return round(float((weight * np.arange(len(weight))).sum()) / total) if total > 0 else len(weight) // 2


def _nmse(image: np.ndarray, target: np.ndarray) -> float:
    """Normalised mean squared error, ``|image - target|^2 / |target|^2`` (the fastMRI definition), over all frames."""
    return float(((image - target) ** 2).sum() / max(float((target**2).sum()), 1e-30))
