"""Figures of the study of systems: contours, images with their errors, agreement of LVEF, and embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool

from kmtr.evaluate.looks import OTHERS, PREDICTED, Look, place_of
from kmtr.metrics.dense import PHASES
from kmtr.metrics.segmentation import extreme_frames
from kmtr.report import figures_tasks
from kmtr.report.figures_tasks import Agreed, Tile
from kmtr.studies.contenders import contender
from kmtr.studies.shown import AFTER, BEFORE, CHOSEN_BY, EMBEDDING, WHITE, headline_of, key, middle
from kmtr.studies.task_measures import MASKS
from kmtr.studies.task_rows import FLOORS, Asked, Shown
from kmtr.types import DISEASES, PHENOTYPES, VIEWS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kmtr.studies.task_study import Study

INTERACTIVE = "embedding.html"
GROUPS = 3
"""Groups of the same size that a phenotype is cut into."""
MOST_ROWS = 3
"""Phenotypes in the picture; all are in the page."""

Pictures = Mapping[str, tuple[str, "Figure"]]
"""Name of the file -> caption and figure."""


def pictures_of(study: Study, rows: Mapping[Asked, object], seen: Sequence[Look], who: Sequence[str]) -> Pictures:
    """Figures of what the rows of the first seed show; those without material are left out.

    Args:
        seen: truth of the subjects that are shown.
        who: each of them is, in words.
    """
    first = {one.start: one for one in rows if one.seed == study.config.study.seeds[0] and one.start != FLOORS}
    shown = {contender(name).title: study.rows.shown(one) for name, one in first.items()}
    there = {title: one for title, one in shown.items() if one}
    if not there:
        return agreement(study, first)
    found = {**agreement(study, first), **contours(study, seen, who, there), **images(study, seen, who, there)}
    return {**found, **clouds(study, there)}


def agreement(study: Study, first: Mapping[str, Asked]) -> Pictures:
    """LVEF of each system, read out and from its masks: predicted against true, and Bland-Altman."""
    r = headline_of(study.config)
    number, panels = study.config.evaluate.accelerations.index(r), []
    truth, unit = study.truth.values.get(CHOSEN_BY), PHENOTYPES[CHOSEN_BY]
    if truth is None:
        return {}
    for name, one in first.items():
        values = study.rows.values(one)
        for target, how in ((CHOSEN_BY, ""), (f"{MASKS}{CHOSEN_BY}", " (masks)")):
            if target in values and np.isfinite(values[target][number]).sum() > 2:
                title = figures_tasks.wrapped(contender(name).title + how, 28)
                panels.append(Agreed(title, unit, truth, values[target][number]))
    if not panels:
        return {}
    caption = (
        f"LVEF of each system at R = {r}, first seed: predicted against true with the line of identity, and "
        "Bland-Altman: bias (solid) and 95 % limits of agreement (dashed). (masks): measured on predicted masks."
    )
    return {"agreement.png": (caption, figures_tasks.agreements(panels, f"LVEF, R = {r}"))}


def contours(study: Study, seen: Sequence[Look], who: Sequence[str], shown: Mapping[str, Shown]) -> Pictures:
    """Contours of each system at the headline's R, a figure for each subject: the paper's figure 3a."""
    r, found = headline_of(study.config), {}
    for look in seen:
        rows = {title: tiles_of(look, r, arrays) for title, arrays in shown.items()}
        rows = {title: tiles for title, tiles in rows.items() if tiles}
        if rows:
            caption = (
                f"True (solid) and predicted (dashed) contours at R = {r} on the fully sampled image, at the truth's "
                f"end-diastole (ED) and end-systole (ES), the middle slice of each view, of {who[look.number - 1]}."
            )
            found[f"masks-{look.number}.png"] = (caption, figures_tasks.overlays(rows, f"Masks, R = {r}"))
    return found


def tiles_of(look: Look, r: int, arrays: Shown) -> dict[str, Tile]:
    """Tiles of one system and subject: the middle slice of each view at both phases."""
    tiles: dict[str, Tile] = {}
    for view in (view for view in VIEWS if view in look.masks):
        said, truth = arrays.get(key("masks", look.number, r, view)), look.masks[view].truth
        frames = extreme_frames(truth)
        if said is None or frames is None:
            continue
        z = len(truth) // 2
        for number, phase in enumerate(PHASES):
            at = z, frames[number]
            name = f"{view.replace('lax_', '')}, {phase.upper()}"
            tiles[name] = Tile(look.full[view][at], truth[at], said[z, number])
    return tiles


def images(study: Study, seen: Sequence[Look], who: Sequence[str], shown: Mapping[str, Shown]) -> Pictures:
    """Images of each system and their errors at every R, of the subject in the middle: the paper's figure 3b."""
    look = next(one for one in seen if one.number == middle(seen))
    view = next(iter(look.full))
    z, t = place_of(look.full[view])
    full, rows = look.full[view][z, t], {}
    for r in study.config.evaluate.accelerations:
        of_r: dict[str, np.ndarray] = {}
        for title, arrays in shown.items():
            others = {name: arrays.get(key(name, look.number, r, view)) for name in OTHERS}
            mine = others | {title: arrays.get(key(PREDICTED, look.number, r, view))}
            of_r |= {name: image / WHITE for name, image in mine.items() if image is not None}
        if of_r:
            rows[f"R = {r}"] = {name: of_r[name] for name in (*OTHERS, *of_r) if name in of_r}
    if not rows:
        return {}
    caption = (
        f"Reconstructed images under one grey scale, and below each its absolute error × {figures_tasks.GAIN}; "
        f"{view.replace('lax_', '')}, the middle slice and the frame that differs most from the mean over the cycle, "
        f"of {who[look.number - 1]}."
    )
    scaled = full / max(float(full.max()), 1e-30)
    return {"images.png": (caption, figures_tasks.image_rows(rows, scaled, "Reconstruction"))}


# ---------------------------------------------------------------------------------------------------------- embeddings


def clouds(study: Study, shown: Mapping[str, Shown]) -> Pictures:
    """t-SNE of k-MTR's embeddings before and after alignment, coloured by phenotypes: the paper's figure 2."""
    panels, groups = embeddings_of(shown), groups_of(study)
    if not panels or not groups:
        return {}
    caption = (
        f"t-SNE in three dimensions of k-MTR's embeddings of the held-out subjects at R = {headline_of(study.config)}, "
        f"after {' and after '.join(panels)}, each by itself; colours: thirds of a true phenotype, a row "
        f"each. Turn it, and choose among all phenotypes and diseases, in {INTERACTIVE}. "
        "Distances between groups of points mean little in t-SNE."
    )
    few = dict([*groups.items()][:MOST_ROWS])
    return {"embedding.png": (caption, figures_tasks.clouds(panels, few, "Embeddings"))}


def embeddings_of(shown: Mapping[str, Shown]) -> dict[str, np.ndarray]:
    """Encoder -> its points ``subject axis``."""
    every = {name: values for arrays in shown.values() for name, values in arrays.items()}
    found = {name: every[EMBEDDING + name] for name in (BEFORE, AFTER) if EMBEDDING + name in every}
    return {name: points.astype(np.float32) for name, points in found.items()}


def groups_of(study: Study) -> dict[str, dict[str, Bool[np.ndarray, " subject"]]]:
    """Target -> groups of held-out subjects -> who is in it: thirds by a true phenotype, lowest first, LVEF before the
    others; a disease's without and with. Targets of the study that too few are known of are left out.
    """
    targets = [CHOSEN_BY, *(one for one in study.config.task.targets if one != CHOSEN_BY), *study.config.task.diseases]
    found = {}
    for target in (one for one in targets if one in study.truth.values):
        truth, short = study.truth.values[target], target.split("_")[0].upper()
        known = truth[np.isfinite(truth)]
        if target in DISEASES and len(np.unique(known)) > 1:
            found[target] = {f"no {target.replace('_', ' ')}": truth == 0, target.replace("_", " "): truth == 1}
        elif target in PHENOTYPES and len(known) >= GROUPS:
            cuts = np.quantile(known, np.linspace(0, 1, GROUPS + 1))
            place = np.where(np.isfinite(truth), np.searchsorted(cuts[1:-1], truth, side="right"), -1)
            unit = PHENOTYPES[target]
            found[target] = {
                f"{short} {low:.1f} to {high:.1f} {unit}": place == i for i, (low, high) in enumerate(pairwise(cuts))
            }
    return found


def write_interactive(study: Study, rows: Mapping[Asked, object], folder: Path) -> Path | None:
    """The embeddings as a page that needs nothing beside it, to be turned with the mouse; None: there are none."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    first = [one for one in rows if one.seed == study.config.study.seeds[0]]
    panels, groups = embeddings_of({one.title: study.rows.shown(one) for one in first}), groups_of(study)
    if not panels or not groups:
        return None
    page = make_subplots(
        rows=1, cols=len(panels), specs=[[{"type": "scene"}] * len(panels)], subplot_titles=list(panels)
    )
    of_target: list[str] = []
    for target, some in groups.items():
        for column, points in enumerate(panels.values(), 1):
            for colour, (group, inside) in zip(figures_tasks.ordered(len(some)), some.items(), strict=True):
                x, y, z = points[inside].T
                marker, shown = {"size": 3, "color": colour}, target == next(iter(groups))
                same = {"name": group, "legendgroup": group, "showlegend": column == 1, "visible": shown}
                page.add_trace(go.Scatter3d(x=x, y=y, z=z, mode="markers", marker=marker, **same), row=1, col=column)
                of_target.append(target)
    buttons = [
        {"label": target, "method": "restyle", "args": [{"visible": [one == target for one in of_target]}]}
        for target in groups
    ]
    page.update_layout(updatemenus=[{"buttons": buttons, "x": 0.0, "xanchor": "left", "y": 1.12}])
    page.update_layout(title="Embeddings of held-out subjects (t-SNE)", legend={"orientation": "h"})
    path = folder / INTERACTIVE
    page.write_html(path, include_plotlyjs=True)
    return path
