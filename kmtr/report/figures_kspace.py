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
    moving = np.ndim(kspace) == 3
    if np.ndim(kspace) not in (2, 3):
        raise InputError(f"kspace: expected axes t ky kx or ky kx, got {np.shape(kspace)}")
    k = np.abs(np.asarray(kspace).reshape((-1, *np.shape(kspace)[-2:])))
    withheld = np.zeros(np.shape(sampled), bool) if hidden is None else np.asarray(hidden, dtype=bool)
    for name, mask in (("sampled", sampled), ("hidden", withheld)):
        if np.shape(mask) != np.shape(kspace)[:-1]:
            raise InputError(f"{name}: expected {np.shape(kspace)[:-1]} like the lines of kspace, got {np.shape(mask)}")
    kept = np.asarray(sampled, dtype=bool).reshape(k.shape[:2])
    withheld = withheld.reshape(k.shape[:2]) & kept
    images = []
    for name, image in (("zero_filled", zero_filled), ("reconstruction", reconstruction), ("target", target)):
        if np.ndim(image) != np.ndim(kspace) or (moving and len(image) != len(k)):
            raise InputError(
                f"{name}: expected axes {'t y x' if moving else 'y x'} of {len(k)} frames, got {np.shape(image)}"
            )
        if np.shape(image) != np.shape(target):
            raise InputError(f"{name}: expected the target's shape {np.shape(target)}, got {np.shape(image)}")
        images.append(np.abs(np.asarray(image, dtype=complex)).reshape((-1, *np.shape(image)[-2:])))
    zero, recon, full = images

    motion = full.std(0)
    at = frame if frame is not None else int(np.argmax(((full - full.mean(0)) ** 2).sum((1, 2))))
    row = profile_row if profile_row is not None else _centre_row(motion)
    window = max(float(np.percentile(full, 99.7)), 1e-30)
    true_r = kept.size / max(int(kept.sum()), 1)

    ny, nx = full.shape[1:]
    width, gap = 2.15, 0.08
    second = width * 0.62
    height = width * ny / nx + (second + 0.3 if moving else 0) + 0.85
    figure = Figure(
        figsize=(5 * width + 4 * gap + 0.35, height),
        layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.04, wspace=0.01),
    )
    grid = figure.subplots(
        2 if moving else 1, 5, squeeze=False, height_ratios=[width * ny / nx, second] if moving else [1]
    )
    figure.suptitle(title, fontsize=LARGE, color=INK, x=0.01, ha="left", fontweight="bold")

    _show_kspace(grid[0, 0], k[at], kept[at], withheld[at])
    grid[0, 0].set_title(f"k-space, true R = {true_r:.1f}", fontsize=NORMAL, color=INK)
    names = ("zero-filled", "reconstruction", "fully sampled", "difference × 5")
    errors = (f"NMSE {_nmse(zero, full):.3f}", f"NMSE {_nmse(recon, full):.3f}", "", "")
    shown = (zero, recon, full, 5 * np.abs(recon - full))
    for axes, name, error, image in zip(grid[0, 1:], names, errors, shown, strict=True):
        style = "inferno" if name.startswith("difference") else "gray"
        axes.imshow(image[at], cmap=style, vmin=0, vmax=window, interpolation="nearest")
        axes.set_title(f"{name}, {error}" if error else name, fontsize=NORMAL, color=INK)
        if moving:
            axes.axhline(row, color="#ffd166", linewidth=0.8, linestyle=(0, (4, 3)))
    if moving:
        _show_pattern(grid[1, 0], kept, withheld, at)
        for axes, name, image in zip(grid[1, 1:], names, shown, strict=True):
            style = "inferno" if name.startswith("difference") else "gray"
            axes.imshow(image[:, row].T, cmap=style, vmin=0, vmax=window, aspect="auto", interpolation="nearest")
            axes.axvline(at, color="#ffd166", linewidth=0.8, linestyle=(0, (4, 3)))
            axes.set_xlabel("frame", fontsize=SMALL, labelpad=1)
        grid[1, 1].set_ylabel(f"x, along y = {row}", fontsize=SMALL)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    grid[0, 1].set_ylabel(f"frame {at + 1} of {len(full)}" if moving else "y", fontsize=SMALL)
    grid[0, 0].set_ylabel("ky", fontsize=SMALL)
    grid[0, 0].set_xlabel("kx (log magnitude)", fontsize=SMALL, labelpad=2)
    if moving:
        grid[1, 0].set_ylabel("ky", fontsize=SMALL)
        grid[1, 0].set_xlabel("frame (lines acquired)", fontsize=SMALL, labelpad=1)
    return figure


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
