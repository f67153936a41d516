"""Figures of scores, losses and speeds: numbers in, Figure out; no pyplot, no window system, nothing global."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from kmtr.report.style import COLOURS, INK, LARGE, NORMAL, SMALL, clean
from kmtr.types import InputError

CUT = -0.2
"""Lower end of the axis of scores: much worse than the mean needs no exact length."""


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
        clean(axes)
        axes.set_title(name, fontsize=NORMAL, color=INK, fontweight="bold")
        if not len(b):
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "no labels", transform=axes.transAxes, ha="center", fontsize=SMALL)
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
            fontsize=SMALL - 1,
            color=INK,
        )
    if title:
        figure.suptitle(title, fontsize=LARGE, color=INK, x=0.01, ha="left", fontweight="bold")
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
    clean(axes)
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
                    at, CUT, f"{score:.2g}", fontsize=SMALL - 2, color="white", ha="center", va="bottom", rotation=90
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
    axes.set_ylabel(ylabel, fontsize=NORMAL)
    axes.grid(axis="y", color="#e3e7eb", linewidth=0.7)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper right", ncols=len(sources), frameon=False, fontsize=SMALL
    )
    if title:
        axes.set_title(title, fontsize=LARGE, loc="left", color=INK, fontweight="bold")
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
        clean(axes)
        for (prefix, points), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
            dots = "o" if len(points) <= 40 else None
            axes.plot(*points.T, color=colour, linewidth=1.3, marker=dots, markersize=3, label=prefix)
        values = np.concatenate([points[:, 1] for points in curves.values()])
        values = values[np.isfinite(values)]
        if values.size and values.min() > 0 and values.max() > 20 * values.min():
            axes.set_yscale("log")
        axes.set_title(name, fontsize=NORMAL, color=INK, fontweight="bold")
        axes.set_xlabel("step", fontsize=SMALL)
        axes.grid(color="#e3e7eb", linewidth=0.7)
        if any(curves):
            axes.legend(frameon=False, fontsize=SMALL)
    if title:
        figure.suptitle(title, fontsize=LARGE, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure


def label_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float, float]]]],
    styles: Mapping[str, tuple[str, str]],
    ylabel: str = "mean $R^2$",
    xlabel: str = "labelled subjects",
    failed: Mapping[str, Mapping[str, Collection[int]]] = MappingProxyType({}),
) -> Figure:
    """A score against the number of labels, or another number, one panel per condition and one line per method.

    Args:
        panels: panel -> method -> (number of labels, score, its SD); a NaN score leaves its place empty.
        styles: method -> colour and line style.
        ylabel: the score of all panels; empty: each has its own, which its name says, and an axis of its own.
        failed: panel -> method -> numbers at which it failed: circled in red.
    """
    if not panels:
        raise InputError("label_curves: expected at least one panel, got none")
    figure = Figure(figsize=(0.6 + 3.1 * len(panels), 4.2), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=bool(ylabel))[0]
    lowest, highest = np.inf, -np.inf
    for axes, (name, curves) in zip(grid, panels.items(), strict=True):
        if not ylabel:
            lowest, highest = np.inf, -np.inf
        clean(axes)
        own: list[float] = []
        budgets = sorted({count for points in curves.values() for count, _, _ in points})
        for number, (method, points) in enumerate(curves.items()):
            labels, score, sd = np.array(sorted(points), dtype=float).T
            colour, line = styles[method]
            aside = labels * (1 + 0.012 * (number - (len(curves) - 1) / 2))  # so that bars do not hide each other
            axes.plot(aside, score, color=colour, linestyle=line, linewidth=1.4, marker="o", markersize=3, label=method)
            axes.errorbar(aside, score, sd, fmt="none", ecolor=colour, elinewidth=0.8, capsize=1.5)
            wrong = np.isin(labels, [*failed.get(name, {}).get(method, ())])
            axes.plot(aside[wrong], score[wrong], "o", markersize=8, markerfacecolor="none", markeredgecolor="red")
            if np.isfinite(score).any():
                own += [np.nanmin(score - sd), np.nanmax(score + sd)]
                lowest, highest = min(lowest, min(own)), max(highest, max(own))
        axes.set_xscale("log")
        axes.set_xticks(budgets, list(map(str, budgets)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(name, fontsize=NORMAL, color=INK, fontweight="bold")
        axes.set_xlabel(xlabel, fontsize=SMALL)
        axes.grid(axis="y", color="#e3e7eb", linewidth=0.7)
        if own and max(own) < CUT:
            told = f"all below {CUT}: {min(own):.1f} to {max(own):.1f}"
            axes.text(0.5, 0.5, told, transform=axes.transAxes, ha="center")
        if np.isfinite(lowest):
            axes.set_ylim(max(lowest - 0.05, CUT), max(min(highest + 0.05, 1.0), CUT + 0.1))
    grid[0].set_ylabel(ylabel, fontsize=NORMAL)
    shown: dict[str, Any] = {}
    for axes in grid:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(name, handle)
    handles, titles = list(shown.values()), list(shown)
    columns = min(3, len(shown))
    figure.legend(handles, titles, loc="outside lower center", ncols=columns, frameon=False, fontsize=SMALL)
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
    clean(axes)
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
                axes.text(0, at, " failed", fontsize=SMALL, color=COLOURS[1], va="center")
            at += 1
    axes.set_yticks(ticks, names)
    for text in axes.get_yticklabels():
        text.set_fontweight("bold" if text.get_text() in groups else "normal")
    axes.tick_params(axis="y", length=0, labelsize=SMALL)
    axes.set_ylim(at - 0.4, -0.6)
    axes.set_xlabel(xlabel, fontsize=SMALL)
    axes.grid(axis="x", color="#e3e7eb", linewidth=0.7)
    if title:
        axes.set_title(title, fontsize=LARGE, loc="left", color=INK, fontweight="bold")
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
        clean(axes)
        axes.barh(names, values, height=0.7, color=colours)
        axes.set_xlabel(label, fontsize=SMALL)
        axes.set_xlim(0, 1.15 * max([*values, *(max(rates[n]) for n in names if axes is left)]))
        axes.grid(axis="x", color="#e3e7eb", linewidth=0.7)
        for at, value in enumerate(values):
            most = max(rates[names[at]]) if axes is left else value
            axes.annotate(
                f"{value:.2f}", (most, at), (5, 0), textcoords="offset points", va="center", fontsize=SMALL, color=INK
            )
    for at, name in enumerate(names):
        left.plot(rates[name], [at] * len(rates[name]), "o", color=INK, markersize=2.5, alpha=0.7)
    handles = [Patch(color=colour, label=group) for group, colour in groups.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=SMALL)
    if title:
        figure.suptitle(title, fontsize=LARGE, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure
