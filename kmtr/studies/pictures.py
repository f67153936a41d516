"""Masks, images and embeddings of a few held-out subjects, which rows keep, so that figures need no model again.

The subjects are those at `looks.PERCENTILES` of the true LVEF, the lowest first: no system has a say in the choice.
Only the first seed's rows keep pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float

from kmtr import machine
from kmtr.config import RunConfig, override
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import NOTHING
from kmtr.encoder import load_encoder
from kmtr.evaluate.looks import PERCENTILES, Look, at_percentiles, looks, place_of
from kmtr.evaluate.probes import CHUNK
from kmtr.metrics.segmentation import extreme_frames
from kmtr.physics.sampling import VALIDATION
from kmtr.studies.shown import AFTER, BEFORE, CHOSEN_BY, EMBEDDING, WHITE, headline_of, key, middle
from kmtr.studies.task_rows import Shown
from kmtr.train.folder import MASKED_ENCODER, Outcome

if TYPE_CHECKING:
    from kmtr.inference import TaskModel
    from kmtr.studies.task_measures import Truth
    from kmtr.studies.task_study import Study

NEIGHBOURS = 30
"""Perplexity of t-SNE at most."""


def chosen(truth: Truth) -> dict[int, str]:
    """Place among the held-out subjects of those that are shown -> who that is, in words."""
    values = truth.values.get(CHOSEN_BY, np.full(len(truth.subjects), np.nan))
    if not np.isfinite(values).any():
        places = at_percentiles(np.arange(len(truth.subjects), dtype=float))
        return dict.fromkeys(places, "one of the held-out subjects, whose LVEF is unknown")
    found: dict[int, str] = {}
    for percentile, place in zip(PERCENTILES, at_percentiles(values), strict=True):
        found.setdefault(place, f"the held-out subject nearest to the {percentile}th percentile of true LVEF")
    return found


def seen_by(study: Study, reading: RunConfig, model: TaskModel | None) -> list[Look]:
    """The shown subjects at every R; without a model their truth alone, at one R."""
    names = [study.truth.subjects[place] for place in chosen(study.truth)]
    rs = study.config.evaluate.accelerations if model else (headline_of(study.config),)
    return looks(reading, study.dataset, model, names, rs)


def shown_of(seen: Sequence[Look]) -> Shown:
    """Arrays that a row keeps: predicted masks of all slices at the truth's end-diastole and end-systole; of the
    subject in the middle also the images of one slice and frame (`place_of`) of the first view, in parts of the
    maximum of the fully sampled one, as whole numbers (`WHITE` is 1).
    """
    kept: dict[str, np.ndarray] = {}
    for look in seen:
        for view, pair in look.masks.items():
            frames = extreme_frames(pair.truth)
            if frames is not None:
                kept[key("masks", look.number, look.acceleration, view)] = pair.predicted[:, frames]
        for name, images in look.images.items() if look.number == middle(seen) else ():
            view = next(iter(look.full))
            z, t = place_of(look.full[view])
            parts = images[view][z, t] / max(float(look.full[view][z, t].max()), 1e-30)
            kept[key(name, look.number, look.acceleration, view)] = np.clip(WHITE * parts, 0, 255).round().astype("u1")
    return kept


def embedded(study: Study, before: Outcome) -> Shown:
    """t-SNE in three dimensions (van der Maaten 2008) of the embeddings of the held-out subjects, before and after
    alignment; empty where alignment left no encoder of its own.

    Args:
        before: the pretraining.
    """
    masked = Path(before.folder) / MASKED_ENCODER
    if not masked.is_dir() or "align_stopped" in before.metrics or len(study.truth.subjects) < 5:
        return {}
    return {
        f"{EMBEDDING}{name}": _tsne(_embeddings(study, str(folder)), study.config.seed).astype(np.float16)
        for name, folder in ((BEFORE, masked), (AFTER, before.encoder))
    }


def _embeddings(study: Study, folder: str) -> Float[np.ndarray, "subject feature"]:
    """Embeddings at the headline's R, in the order of the study's truth."""
    device = machine.device(study.config.train.device)
    encoder = load_encoder(folder, device)
    fixed = override(study.config, {"sampling.accelerations": (headline_of(study.config),)})
    reader = study.dataset.reader("test", study.config.data)
    rows = sorted(subjects.held_out(study.config.seed, len(reader), study.config.evaluate.subjects))
    read = pipeline.read_in_order(reader, rows, CHUNK, fixed, NOTHING, VALIDATION)
    return np.concatenate([encoder.features(host.to(torch.device(device))) for host in read])


def _tsne(features: Float[np.ndarray, "subject feature"], seed: int) -> Float[np.ndarray, "subject axis"]:
    from sklearn.manifold import TSNE

    perplexity = min(NEIGHBOURS, (len(features) - 1) / 3)
    spread = features.std(0)
    standard = (features - features.mean(0)) / np.where(spread > 0, spread, 1)
    found: np.ndarray = TSNE(3, perplexity=perplexity, init="pca", random_state=seed).fit_transform(standard)
    return found
