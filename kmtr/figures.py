"""Figures from numpy arrays. Pure functions: no pyplot, no window system, nothing global; arrays in, Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from kmtr.config import RunConfig
from kmtr.physics import random
from kmtr.physics import sampling as patterns
from kmtr.types import InputError

COLOURS = ("#0b5cad", "#d1495b", "#2a9d72", "#e09f3e", "#7b5ea7", "#5b6470")
"""Told apart with the common forms of colour blindness, and in grey."""
UNSAMPLED = (0.10, 0.22, 0.42)
"""RGB of k-space that was not acquired: a colour, so that it can't be taken for a weak signal."""
HIDDEN = (0.95, 0.62, 0.20)
"""RGB that tints acquired k-space which masked pretraining withheld from the encoder."""
INK = "#1b1f24"
CUT = -0.2
"""Lower end of the axis of scores: much worse than the mean needs no exact length."""
_SMALL, _NORMAL, _LARGE = 8, 9, 11  # points


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
    figure.suptitle(title, fontsize=_LARGE, color=INK, x=0.01, ha="left", fontweight="bold")

    _show_kspace(grid[0, 0], k[at], kept[at], withheld[at])
    grid[0, 0].set_title(f"k-space, true R = {true_r:.1f}", fontsize=_NORMAL, color=INK)
    names = ("zero-filled", "reconstruction", "fully sampled", "difference × 5")
    errors = (f"NMSE {_nmse(zero, full):.3f}", f"NMSE {_nmse(recon, full):.3f}", "", "")
    shown = (zero, recon, full, 5 * np.abs(recon - full))
    for axes, name, error, image in zip(grid[0, 1:], names, errors, shown, strict=True):
        style = "inferno" if name.startswith("difference") else "gray"
        axes.imshow(image[at], cmap=style, vmin=0, vmax=window, interpolation="nearest")
        axes.set_title(f"{name}, {error}" if error else name, fontsize=_NORMAL, color=INK)
        if moving:
            axes.axhline(row, color="#ffd166", linewidth=0.8, linestyle=(0, (4, 3)))
    if moving:
        _show_pattern(grid[1, 0], kept, withheld, at)
        for axes, name, image in zip(grid[1, 1:], names, shown, strict=True):
            style = "inferno" if name.startswith("difference") else "gray"
            axes.imshow(image[:, row].T, cmap=style, vmin=0, vmax=window, aspect="auto", interpolation="nearest")
            axes.axvline(at, color="#ffd166", linewidth=0.8, linestyle=(0, (4, 3)))
            axes.set_xlabel("frame", fontsize=_SMALL, labelpad=1)
        grid[1, 1].set_ylabel(f"x, along y = {row}", fontsize=_SMALL)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    grid[0, 1].set_ylabel(f"frame {at + 1} of {len(full)}" if moving else "y", fontsize=_SMALL)
    grid[0, 0].set_ylabel("ky", fontsize=_SMALL)
    grid[0, 0].set_xlabel("kx (log magnitude)", fontsize=_SMALL, labelpad=2)
    if moving:
        grid[1, 0].set_ylabel("ky", fontsize=_SMALL)
        grid[1, 0].set_xlabel("frame (lines acquired)", fontsize=_SMALL, labelpad=1)
    return figure


def probe_scatter(
    predicted: np.ndarray, truth: np.ndarray, names: Sequence[str], units: Sequence[str], title: str = ""
) -> Figure:
    """Predicted against true, one panel per phenotype, with the line of identity, R2, mean error and its scatter.

    Args:
        predicted, truth: ``subject phenotype``; a pair with a NaN is left out.
        names, units: of the phenotypes.

    Raises:
        InputError: shapes that do not fit.
    """
    p, t = np.asarray(predicted, dtype=float), np.asarray(truth, dtype=float)
    if p.ndim != 2 or p.shape != t.shape or p.shape[1] != len(names) or len(names) != len(units):
        raise InputError(
            f"predicted, truth: expected subject x {len(names)} phenotypes with a unit each, got {p.shape}, {t.shape} "
            f"and {len(units)} units"
        )
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.3 * rows + (0.35 if title else 0)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name, unit, a, b in zip(grid.flat, names, units, p.T, t.T, strict=False):
        both = np.isfinite(a) & np.isfinite(b)
        a, b = a[both], b[both]
        _clean(axes)
        axes.set_title(name, fontsize=_NORMAL, color=INK, fontweight="bold")
        if not len(b):
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "no labels", transform=axes.transAxes, ha="center", fontsize=_SMALL)
            continue
        low, high = min(a.min(), b.min()), max(a.max(), b.max())
        margin = 0.05 * (high - low) or 1.0
        limits = (low - margin, high + margin)
        axes.plot(limits, limits, color="#9aa4b0", linewidth=1)
        axes.scatter(b, a, s=7, alpha=0.45, color=COLOURS[0], linewidths=0)
        axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel=f"true ({unit})", ylabel=f"predicted ({unit})")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        spread = ((b - b.mean()) ** 2).sum()
        r2 = f"{1 - ((a - b) ** 2).sum() / spread:.2f}" if spread > 0 else "–"
        axes.text(
            0.04,
            0.96,
            f"$R^2$ = {r2}\n{(a - b).mean():+.1f} ± {(a - b).std():.1f} {unit}\nn = {len(b)}",
            transform=axes.transAxes,
            va="top",
            fontsize=_SMALL - 1,
            color=INK,
        )
    if title:
        figure.suptitle(title, fontsize=_LARGE, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure


def probe_bars(
    table: Mapping[str, Mapping[str, tuple[float, float, float]]], ylabel: str = "$R^2$", title: str = ""
) -> Figure:
    """A score per phenotype for several feature sources, with intervals; grouped by phenotype.

    Args:
        table: feature source -> phenotype -> (score, lower end, upper end); a phenotype that a source lacks, or a NaN,
            leaves its place empty.
        ylabel: the score. The axis is cut at -0.2: a bar that goes further says its value there.
    """
    sources = list(table)
    names = list(dict.fromkeys(name for scores in table.values() for name in scores))
    if not names:
        raise InputError("probe_bars: expected at least one feature source with one score, got none")
    figure = Figure(figsize=(max(5.0, 1.2 + len(names) * (0.22 * len(sources) + 0.25)), 3.1), layout="constrained")
    axes = figure.subplots()
    _clean(axes)
    width = 0.82 / len(sources)
    lowest = 0.0
    for s, source in enumerate(sources):
        value = np.array([table[source].get(name, (np.nan,) * 3) for name in names], dtype=float)
        x = np.arange(len(names)) + (s - (len(sources) - 1) / 2) * width
        errors = np.abs(value[:, 1:] - value[:, :1]).T
        axes.bar(x, value[:, 0], width * 0.92, color=COLOURS[s % len(COLOURS)], label=source)
        axes.errorbar(x, value[:, 0], errors, fmt="none", ecolor=INK, elinewidth=0.8, capsize=1.5)
        for at, score in zip(x, value[:, 0], strict=True):
            if score < CUT:
                axes.text(
                    at, CUT, f"{score:.2g}", fontsize=_SMALL - 2, color="white", ha="center", va="bottom", rotation=90
                )
        if np.isfinite(value).any():
            lowest = min(lowest, float(np.nanmin(value)))
    axes.axhline(0, color=INK, linewidth=0.8)
    floor = max(lowest * 1.1, CUT)
    axes.set_ylim(floor, 1.0)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xticks(
        np.arange(len(names)), names, rotation=35 if len(names) > 5 else 0, ha="right" if len(names) > 5 else "center"
    )
    axes.set_ylabel(ylabel, fontsize=_NORMAL)
    axes.grid(axis="y", color="#e3e7eb", linewidth=0.7)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper right", ncols=len(sources), frameon=False, fontsize=_SMALL
    )
    if title:
        axes.set_title(title, fontsize=_LARGE, loc="left", color=INK, fontweight="bold")
    return figure


def loss_curves(history: Mapping[str, Sequence[tuple[int, float]]], title: str = "") -> Figure:
    """Metrics over steps: one panel per name, training and validation of the same name together.

    Args:
        history: name -> (step, value) pairs. ``train/x`` and ``val/x`` (any prefix up to the first slash) share the
            panel ``x``. Positive values get a logarithmic axis where they span more than a factor of 20.
    """
    panels: dict[str, dict[str, np.ndarray]] = {}
    for name, pairs in history.items():
        prefix, _, rest = name.rpartition("/") if name.count("/") == 1 else name.partition("/")
        panels.setdefault(rest or name, {})[prefix] = np.array(sorted(pairs), dtype=float).reshape(-1, 2)
    if not panels:
        raise InputError("loss_curves: expected at least one metric, got none")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.4 * rows + (0.35 if title else 0)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, curves) in zip(grid.flat, panels.items(), strict=False):
        _clean(axes)
        for (prefix, points), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
            dots = "o" if len(points) <= 40 else None
            axes.plot(*points.T, color=colour, linewidth=1.3, marker=dots, markersize=3, label=prefix)
        values = np.concatenate([points[:, 1] for points in curves.values()])
        values = values[np.isfinite(values)]
        if values.size and values.min() > 0 and values.max() > 20 * values.min():
            axes.set_yscale("log")
        axes.set_title(name, fontsize=_NORMAL, color=INK, fontweight="bold")
        axes.set_xlabel("step", fontsize=_SMALL)
        axes.grid(color="#e3e7eb", linewidth=0.7)
        if any(curves):
            axes.legend(frameon=False, fontsize=_SMALL)
    if title:
        figure.suptitle(title, fontsize=_LARGE, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure


def label_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float, float]]]], styles: Mapping[str, tuple[str, str]]
) -> Figure:
    """A score against the number of labels, one panel per condition and one line per method.

    Args:
        panels: panel -> method -> (number of labels, score, its SD); a NaN score leaves its place empty.
        styles: method -> colour and line style.
    """
    if not panels:
        raise InputError("label_curves: expected at least one panel, got none")
    figure = Figure(figsize=(0.6 + 3.1 * len(panels), 4.2), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    lowest, highest = np.inf, -np.inf
    for axes, (name, curves) in zip(grid, panels.items(), strict=True):
        _clean(axes)
        budgets = sorted({count for points in curves.values() for count, _, _ in points})
        for number, (method, points) in enumerate(curves.items()):
            labels, score, sd = np.array(sorted(points), dtype=float).T
            colour, line = styles[method]
            aside = labels * (1 + 0.012 * (number - (len(curves) - 1) / 2))  # so that bars do not hide each other
            axes.plot(aside, score, color=colour, linestyle=line, linewidth=1.4, marker="o", markersize=3, label=method)
            axes.errorbar(aside, score, sd, fmt="none", ecolor=colour, elinewidth=0.8, capsize=1.5)
            if np.isfinite(score).any():
                lowest, highest = min(lowest, np.nanmin(score)), max(highest, np.nanmax(score + sd))
        axes.set_xscale("log")
        axes.set_xticks(budgets, list(map(str, budgets)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(name, fontsize=_NORMAL, color=INK, fontweight="bold")
        axes.set_xlabel("labelled subjects", fontsize=_SMALL)
        axes.grid(axis="y", color="#e3e7eb", linewidth=0.7)
    if np.isfinite(lowest):
        grid[0].set_ylim(max(lowest - 0.05, CUT), min(highest + 0.05, 1.0))
    grid[0].set_ylabel("mean $R^2$", fontsize=_NORMAL)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(3, len(names)), frameon=False, fontsize=_SMALL)
    return figure


def differences(
    groups: Mapping[str, Mapping[str, tuple[float, float, float]]], noise: float, xlabel: str, title: str = ""
) -> Figure:
    """Differences to a reference with their intervals, grouped: a dot per variant, the noise as a band about zero.

    Args:
        groups: group -> variant -> (difference, lower end, upper end); NaN: none, said so.
        noise: half width of the band: what differs without a reason. NaN or 0: no band.
    """
    rows = [(group, variant, value) for group, variants in groups.items() for variant, value in variants.items()]
    if not rows:
        raise InputError("differences: expected at least one variant, got none")
    figure = Figure(figsize=(7.2, 1.1 + 0.27 * (len(rows) + len(groups))), layout="constrained")
    axes = figure.subplots()
    _clean(axes)
    if noise > 0:
        axes.axvspan(-noise, noise, color="#e3e7eb", linewidth=0)
    axes.axvline(0, color=INK, linewidth=0.8)
    at, ticks, names = 0, [], []
    for number, (group, variants) in enumerate(groups.items()):
        ticks.append(at)
        names.append(group)
        at += 1
        for variant, (value, low, high) in variants.items():
            ticks.append(at)
            names.append(variant)
            if np.isfinite(value):
                axes.plot([low, high], [at, at], color=COLOURS[number % len(COLOURS)], linewidth=1.4)
                axes.plot(value, at, "o", color=COLOURS[number % len(COLOURS)], markersize=5)
            else:
                axes.text(0, at, " failed", fontsize=_SMALL, color=COLOURS[1], va="center")
            at += 1
    axes.set_yticks(ticks, names)
    for text in axes.get_yticklabels():
        text.set_fontweight("bold" if text.get_text() in groups else "normal")
    axes.tick_params(axis="y", length=0, labelsize=_SMALL)
    axes.set_ylim(at - 0.4, -0.6)
    axes.set_xlabel(xlabel, fontsize=_SMALL)
    axes.grid(axis="x", color="#e3e7eb", linewidth=0.7)
    if title:
        axes.set_title(title, fontsize=_LARGE, loc="left", color=INK, fontweight="bold")
    return figure


def sampling(config: RunConfig, table: torch.Tensor | None = None) -> Figure:
    """What the configured family samples: a column for each nominal R, with one slice's pattern over its share of ky.

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
        above.set_title(f"{name}: true R {true_r:.2f}, {acs} ACS", fontsize=_NORMAL, color=INK)
        kept = sampled[0, 0].numpy()
        _show_pattern(above, kept, np.zeros_like(kept), None)
        above.set(xticks=[], yticks=[], xlabel="frame")
        share = sampled.double().mean((0, 1, 2)).numpy()
        ky = np.arange(len(share)) - len(share) // 2
        below.fill_between(ky, share, step="mid", color=COLOURS[0], alpha=0.85, linewidth=0)
        below.set(xlabel="ky", ylim=(0, 1.02), xlim=(ky[0], ky[-1]))
        _clean(below)
        above.xaxis.label.set_size(_SMALL)
    grid[0, 0].set_ylabel("ky", fontsize=_SMALL)
    grid[1, 0].set_ylabel("share of frames that sample it")
    figure.suptitle(f"Sampling: {how.family}", fontsize=_LARGE, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure


def speeds(
    rates: Mapping[str, Sequence[float]], memory: Mapping[str, float], kinds: Mapping[str, str], title: str = ""
) -> Figure:
    """Bandwidth of several ways to read the same bytes, and beside it their memory: bars, the fastest at the top.

    Args:
        rates: name -> GB/s of every round; the bar is the median, dots are the rounds.
        memory: name -> peak memory in GiB.
        kinds: name -> group, one colour each.
    """
    if not rates:
        raise InputError("speeds: expected at least one path, got none")
    median = {name: float(np.median(values)) for name, values in rates.items()}
    names = sorted(rates, key=lambda name: median[name])
    groups = dict(zip(dict.fromkeys(kinds.values()), (COLOURS[5], COLOURS[0], COLOURS[3], *COLOURS[1:3]), strict=False))
    figure = Figure(figsize=(8.0, 1.3 + 0.32 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1], sharey=True)
    colours = [groups[kinds[name]] for name in names]
    panels = ((left, [median[n] for n in names], "GB/s"), (right, [memory[n] for n in names], "peak memory, GiB"))
    for axes, values, label in panels:
        _clean(axes)
        axes.barh(names, values, height=0.7, color=colours)
        axes.set_xlabel(label, fontsize=_SMALL)
        axes.set_xlim(0, 1.15 * max([*values, *(max(rates[n]) for n in names if axes is left)]))
        axes.grid(axis="x", color="#e3e7eb", linewidth=0.7)
        for at, value in enumerate(values):
            most = max(rates[names[at]]) if axes is left else value
            axes.annotate(
                f"{value:.2f}", (most, at), (5, 0), textcoords="offset points", va="center", fontsize=_SMALL, color=INK
            )
    for at, name in enumerate(names):
        left.plot(rates[name], [at] * len(rates[name]), "o", color=INK, markersize=2.5, alpha=0.7)
    handles = [Patch(color=colour, label=group) for group, colour in groups.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=_SMALL)
    if title:
        figure.suptitle(title, fontsize=_LARGE, color=INK, x=0.01, ha="left", fontweight="bold")
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
        style = {"fontsize": _SMALL - 1, "framealpha": 0.85, "borderpad": 0.3, "handlelength": 1}
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


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa4b0")
    axes.tick_params(labelsize=_SMALL - 1, color="#9aa4b0", labelcolor=INK, length=3)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_size(_SMALL)
    axes.yaxis.label.set_size(_SMALL)
