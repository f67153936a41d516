"""Figures of a search: score against each key, learning curves, trials as lines over all keys; and both to touch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kmtr.config import typed
from kmtr.files import write_atomic
from kmtr.report.style import COLOURS, INK, SMALL, clean
from tune.ledger import FINISHED, RECIPE, Trial
from tune.plan import Plan
from tune.space import Choice, Domain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAINT = "#b8c1cc"


def all_of(plan: Plan, best: Trial | None) -> list[tuple[str, str, Figure]]:
    """File name, caption and figure of each."""
    return [
        (
            "keys",
            "Score against each searched key. Filled: finished, open: stopped; red: the trial that is left; band: mean "
            "and range of the recipe's fresh seeds.",
            against_keys(plan, best),
        ),
        ("curves", "Score at every validation. Red: the trial that is left; grey: stopped.", curves(plan, best)),
        ("parallel", "Every line is a trial, from its values to its score; darker is better.", parallel(plan, best)),
    ]


def against_keys(plan: Plan, best: Trial | None) -> Figure:
    """Score of every trial against its value of each key."""
    from matplotlib.figure import Figure

    domains = plan.space.domains
    columns = min(len(domains), 4)
    rows = -(-len(domains) // columns)
    drawing = Figure(figsize=(3.1 * columns, 2.7 * rows), layout="constrained")
    grid = drawing.subplots(rows, columns, sharey=True, squeeze=False)
    own = [run.score for run in plan.ledger.repeats(RECIPE) if run.scored]
    for axes, (key, domain) in zip(grid.flat, domains.items(), strict=False):
        if own:
            axes.axhspan(min(own), max(own), color=FAINT, alpha=0.35, linewidth=0)
            axes.axhline(float(np.mean(own)), color=FAINT, linewidth=1)
        for trial in _scored(plan):
            colour = COLOURS[1] if best is not None and trial.number == best.number else COLOURS[0]
            full = colour if trial.status == FINISHED else "none"
            axes.plot(_place(domain, trial.values[key]), trial.score, "o", color=colour, markerfacecolor=full)
        _ticks(axes, domain)
        axes.set_xlabel(key, color=INK)
        axes.grid(alpha=0.25)
        clean(axes)
    for axes in list(grid.flat)[len(domains) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("score", color=INK)
    return drawing


def curves(plan: Plan, best: Trial | None) -> Figure:
    """Score of every trial at every validation."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6.2, 3.2), layout="constrained")
    axes = drawing.subplots()
    for trial in plan.trials:
        known = [(step, score) for step, score in trial.reports if math.isfinite(score)]
        if not known:
            continue
        left = best is not None and trial.number == best.number
        colour = COLOURS[1] if left else COLOURS[0] if trial.status == FINISHED else FAINT
        steps, scores = zip(*known, strict=True)
        axes.plot(
            steps, scores, "-o", markersize=3, color=colour, linewidth=1.8 if left else 1, zorder=3 if left else 2
        )
        axes.annotate(
            str(trial.number), (steps[-1], scores[-1]), (3, 0), textcoords="offset points", fontsize=SMALL - 1
        )
    axes.set_xlabel("step")
    axes.set_ylabel("score")
    axes.grid(alpha=0.25)
    clean(axes)
    return drawing


def parallel(plan: Plan, best: Trial | None) -> Figure:
    """Parallel coordinates: an axis for each key and one for the score."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    domains, trials = plan.space.domains, _scored(plan)
    drawing = Figure(figsize=(2.0 + 1.5 * len(domains), 3.2), layout="constrained")
    axes = drawing.subplots()
    scores = [trial.score for trial in trials] or [0.0]
    low, high = min(scores), max(scores)
    for trial in sorted(trials, key=lambda t: t.score):
        height = [_share(domain, trial.values[key]) for key, domain in domains.items()]
        share = (trial.score - low) / (high - low) if high > low else 0.5
        left = best is not None and trial.number == best.number
        colour = COLOURS[1] if left else colormaps["Blues"](0.25 + 0.7 * share)
        axes.plot([*height, share], color=colour, linewidth=2 if left else 1)
    for place, domain in enumerate(domains.values()):
        axes.axvline(place, color=INK, linewidth=0.6)
        for share, text in _marks(domain):
            axes.annotate(text, (place, share), (3, 0), textcoords="offset points", fontsize=SMALL - 1, va="center")
    axes.axvline(len(domains), color=INK, linewidth=0.6)
    for share, value in ((0.0, low), (1.0, high)):
        axes.annotate(f"{value:.3f}", (len(domains), share), (3, 0), textcoords="offset points", fontsize=SMALL - 1)
    axes.set_xticks(range(len(domains) + 1), [*domains, "score"], fontsize=SMALL)
    axes.set_xlim(-0.1, len(domains) + 0.35)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return drawing


def interactive(plan: Plan, path: Path) -> Path:
    """A page with parallel coordinates and learning curves, on which axes can be dragged and trials pointed at."""
    import plotly.graph_objects as go

    domains, trials = plan.space.domains, _scored(plan)
    axes: list[dict[str, Any]] = []
    for key, domain in domains.items():
        marks = _marks(domain)
        values = [_share(domain, trial.values[key]) for trial in trials]
        axes.append(
            {
                "label": key,
                "values": values,
                "range": [0, 1],
                "tickvals": [share for share, _ in marks],
                "ticktext": [text for _, text in marks],
            }
        )
    scores = [trial.score for trial in trials]
    axes.append({"label": "score", "values": scores})
    lines = go.Figure(go.Parcoords(line={"color": scores, "colorscale": "Blues", "showscale": True}, dimensions=axes))
    lines.update_layout(title="Trials: drag along an axis to choose some", height=420, margin={"l": 90, "t": 90})
    learning = go.Figure()
    for trial in plan.trials:
        if trial.reports:
            steps, scored = zip(*trial.reports, strict=True)
            hover = "<br>".join(f"{key}={typed(value)}" for key, value in trial.values.items())
            learning.add_scatter(x=steps, y=scored, mode="lines+markers", name=f"trial {trial.number}", text=hover)
    learning.update_traces(hovertemplate="step %{x}, score %{y:.4f}<br>%{text}")
    learning.update_layout(title="Score at every validation", xaxis_title="step", yaxis_title="score", height=420)
    body = lines.to_html(full_html=False, include_plotlyjs=True) + learning.to_html(
        full_html=False, include_plotlyjs=False
    )
    write_atomic(path, f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Search</title>{body}</html>')
    return path


def _scored(plan: Plan) -> list[Trial]:
    """Trials that reported something, and have a value of every key."""
    return [t for t in plan.trials if math.isfinite(t.score) and all(key in t.values for key in plan.space.domains)]


def _place(domain: Domain, value: Any) -> float:
    """Where a value stands on its axis: the number itself, or the place of a choice."""
    return float(domain.values.index(value)) if isinstance(domain, Choice) else float(value)


def _share(domain: Domain, value: Any) -> float:
    """Where a value stands between the ends of its domain, 0 to 1."""
    if isinstance(domain, Choice):
        return domain.values.index(value) / max(len(domain) - 1, 1)
    low, high, at = (math.log(x) if domain.log else x for x in (domain.low, domain.high, value))
    return (at - low) / (high - low) if high > low else 0.5


def _marks(domain: Domain) -> list[tuple[float, str]]:
    """Shares of an axis that are labelled, and their labels."""
    if isinstance(domain, Choice):
        return [(_share(domain, value), typed(value)) for value in domain.values]
    return [(share, f"{_at(domain, share):.3g}") for share in (0.0, 0.5, 1.0)]


def _at(domain: Any, share: float) -> float:
    low, high = domain.low, domain.high
    return float(low * (high / low) ** share if domain.log else low + (high - low) * share)


def _ticks(axes: Axes, domain: Domain) -> None:
    if isinstance(domain, Choice):
        axes.set_xticks(range(len(domain)), [typed(value) for value in domain.values])
        axes.set_xlim(-0.5, len(domain) - 0.5)
    elif domain.log and domain.high > domain.low:
        axes.set_xscale("log")
        axes.set_xticks(
            [_at(domain, s) for s in (0, 0.33, 0.67, 1)], [f"{_at(domain, s):.2g}" for s in (0, 0.33, 0.67, 1)]
        )
        axes.set_xticks([], minor=True)
