"""Result of a search: table and figure of its trials, a page, and the parent run in MLflow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kmtr import tracking
from kmtr.config import RunConfig, typed
from kmtr.report.html import Table, png, write_report
from kmtr.report.style import COLOURS, INK
from kmtr.tracking.store import reaching
from tune.ledger import Ledger, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def open_parent(config: RunConfig, name: str, trials: int, digest: str) -> str:
    """The MLflow run that all trials are children of, opened again where the search has one; its id.

    Args:
        digest: of the dataset.
    """
    uri = config.tracking.uri
    parent = tracking.open_run(
        config,
        name=name,
        resume_id=tracking.find_run(uri, config.tracking.experiment, name),
        tags={"search.trials": str(trials)},
        besides=("search",),
    )
    tracking.log_dataset(uri, parent, Path(config.data.root).name, digest, config.data.root)
    return parent


def close_children(config: RunConfig, ledger: Ledger) -> None:
    """End the MLflow runs whose process Tune killed, after what their spools still hold is sent."""
    uri = config.tracking.uri
    for trial in ledger.trials:
        run_id = tracking.find_run(uri, config.tracking.experiment, trial.name)
        if run_id is None:
            continue
        ledger.update(trial.number, run_id=run_id)
        if trial.status == "finished":
            continue
        tracking.replay(Path(config.storage.root) / trial.name / "spool", uri)
        why = {"stopped": "asha", "waiting": "interrupted"}.get(trial.status)
        if why is not None:
            with reaching(uri) as mlflow:
                mlflow.set_tag(run_id, "search.stopped", why)
        tracking.end_run(uri, run_id, "FAILED" if trial.status == "failed" else "KILLED")


def publish(config: RunConfig, ledger: Ledger, folder: Path, parent: str, best: Trial) -> Path:
    """The result in MLflow's parent run, and as a page of its own beside the ledger."""
    page = write_report(
        folder / "search.html",
        title=f"Search {folder.name}",
        summary=f"Best: trial {best.number} with {shown(best.values)}, probe R² {best.score:.3f} on subjects of the "
        "validation split. It was chosen on these very subjects: evaluate it on the test split.",
        tables=[table(ledger)],
        figures=[("Score against each searched key; red: the best, open: it did not finish.", figure(ledger, best))],
        footer=f"MLflow run {parent}; best run {best.run_id}",
    )
    (folder / "search.png").write_bytes(png(figure(ledger, best)))
    with reaching(config.tracking.uri) as mlflow:
        for trial in ledger.trials:
            if math.isfinite(trial.score):
                mlflow.log_metric(parent, "trial/probe_r2", trial.score, step=trial.number)
        mlflow.log_metric(parent, "best/probe_r2", best.score)
        tags = {"best/trial": best.number, "best/run_id": best.run_id, "best/run_name": best.name}
        for key, value in (tags | {f"best/{key}": typed(value) for key, value in best.values.items()}).items():
            mlflow.set_tag(parent, key, str(value))
        for file in (page, folder / "search.png"):
            mlflow.log_artifact(parent, str(file))
    return page


def table(ledger: Ledger) -> Table:
    """All trials, the best score first; what was stopped earlier cannot be above what finished."""
    order = sorted(
        ledger.trials, key=lambda t: (t.status != "finished", -t.step, -t.score if math.isfinite(t.score) else math.inf)
    )
    keys = list(ledger.trials[0].values)
    return Table(
        caption="Trials by probe R² on held-out subjects",
        columns=("trial", *keys, "probe R²", "step", "status"),
        rows=tuple(
            (t.number, *(typed(t.values[key]) for key in keys), t.score, t.step, t.reason[:60] or t.status)
            for t in order
        ),
        best=(("probe R²", "max"),) if len(order) > 1 else (),
    )


def figure(ledger: Ledger, best: Trial) -> Figure:
    """Score against each searched key."""
    from matplotlib.figure import Figure

    keys = list(best.values)
    scored = [t for t in ledger.trials if math.isfinite(t.score)]
    drawing = Figure(figsize=(3.1 * len(keys), 2.9), layout="constrained")
    for axes, key in zip(drawing.subplots(1, len(keys), sharey=True, squeeze=False)[0], keys, strict=True):
        for t in scored:
            colour = COLOURS[1] if t.number == best.number else COLOURS[0]
            full = t.status == "finished"
            axes.plot(_number(t.values[key]), t.score, "o", color=colour, markerfacecolor=colour if full else "none")
        if key == "align.temperature":
            axes.set_xscale("log")
            ends = [_number(t.values[key]) for t in scored]
            ticks = sorted({float(f"{x:.2g}") for x in np.geomspace(min(ends), max(ends), 4)})
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.set_xticks([], minor=True)
        axes.set_xlabel(key, fontsize=9, color=INK)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    drawing.axes[0].set_ylabel("probe R²", fontsize=9, color=INK)
    return drawing


def shown(values: dict[str, Any]) -> str:
    return "  ".join(f"{key}={typed(value)}" for key, value in values.items())


def _number(value: Any) -> float:
    return float(value[0]) if isinstance(value, tuple) else float(value)
