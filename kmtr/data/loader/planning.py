"""The plan of a configuration on a dataset: whether it fits, the batch shapes, the order of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
from jaxtyping import Int

from kmtr.config import Data, RunConfig
from kmtr.data.dataset.manifest import merged
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import buckets, patterns
from kmtr.data.loader.buckets import Buckets, Shape
from kmtr.data.loader.order import Plan, Source
from kmtr.data.loader.shapes import cells_in, cells_of, shape_of
from kmtr.types import InputError, KmtrError


def check_shapes(config: RunConfig, dataset: Dataset) -> None:
    """Refuse a dataset that can't feed this configuration, before a worker starts.

    Raises:
        InputError: a view is missing, there are more coils than the configuration has, a matrix is larger, too few
            lines would be left, or the pattern file is of another number of lines.
    """
    data = config.data
    patterns.check(config)
    table = patterns.table(config.sampling)
    for view in data.views:
        if view not in dataset.shapes:
            have = ",".join(dataset.shapes)
            raise InputError(f"data.views: expected views of the dataset ({have}), got {view}; set data.views={have}")
        for slices, coils, frames, ny, nx in dataset.shapes[view]:
            if coils > data.coils:
                raise InputError(f"data.coils: {view} of the dataset has {coils} coils, got data.coils={data.coils}")
            if (ny > data.matrix[0] or nx > data.matrix[1]) and not data.crop:
                raise InputError(
                    f"data.matrix: {view} of the dataset is {ny} x {nx}, got {data.matrix[0]} x {data.matrix[1]}; "
                    f"set data.matrix={ny},{nx}, or data.crop=true to crop or pad it"
                )
            if ny != data.matrix[0] and data.crop and view in dataset.undersampled:
                raise InputError(
                    f"data.matrix: {view} is undersampled along ky, so its {ny} lines can't become {data.matrix[0]}"
                )
            if frames < data.frames / 2 or slices == 0:
                raise InputError(
                    f"data.frames: {view} of the dataset has {frames} frames, got data.frames={data.frames}"
                )
            lines = data.matrix[0] if data.crop else ny
            if table is not None:
                patterns.check_lines(table, view, lines)
                continue
            config.check_lines(lines, view)


def unreached(data: Data, dataset: Dataset) -> str:
    """Advice on what of the configuration's full shape no subject fills, in one line; empty: all is filled."""
    shapes = [shape for view in data.views for shape in dataset.shapes.get(view, [])]
    if not shapes or data.crop:
        return ""
    _, coils, _, ny, nx = (max(sizes) for sizes in zip(*shapes, strict=True))
    if coils < data.coils:
        return f"data.coils: no subject has more than {coils} coils, got {data.coils}; set data.coils={coils}"
    if (ny, nx) != data.matrix:
        return (
            f"data.matrix: no subject is larger than {ny} x {nx}, got {data.matrix[0]} x {data.matrix[1]}, so images "
            f"are interpolated; set data.matrix={ny},{nx}"
        )
    return ""


@dataclasses.dataclass(frozen=True)
class Classes:
    """The different batch shapes that the subjects of a split would need, each for itself.

    Attributes:
        counts: subjects of each.
        held: mean complex samples of such a subject, its own padding (of a missing view, a shorter series) left out.
        of: (dataset, index into its `Manifest.subject_shapes`) -> class.
    """

    shapes: tuple[Shape, ...]
    counts: tuple[int, ...]
    held: tuple[float, ...]
    of: dict[tuple[int, int], int]


Rows = Int[np.ndarray, " chosen"] | None
"""Rows of a split that are trained on alone, ascending (`subjects.budget`); None: all of them."""


def members(dataset: Dataset, split: str, rows: Rows = None) -> list[Source]:
    """Each dataset's rows of a split, or those chosen; their shape class is the index into its
    `Manifest.subject_shapes`.
    """
    found, first = [], 0
    for manifest in dataset.manifests:
        shards = [shard for shard in manifest.shards if shard.split == split]
        groups, shapes = (merged(run for shard in shards for run in getattr(shard, of)) for of in ("groups", "shapes"))
        source = Source(sum(shard.rows for shard in shards), groups, shapes)
        if rows is not None:
            here = rows[(rows >= first) & (rows < first + source.rows)]
            first, source = first + source.rows, source.only(here - first)
        found.append(source)
    return found


def shape_classes(config: RunConfig, dataset: Dataset, split: str = "train", rows: Rows = None) -> Classes:
    """The shapes that the subjects of a split need; those of other splits do not make its batches larger."""
    found: dict[Shape, int] = {}
    counts: list[int] = []
    totals: list[int] = []
    of: dict[tuple[int, int], int] = {}
    for d, (manifest, source) in enumerate(zip(dataset.manifests, members(dataset, split, rows), strict=True)):
        each = np.zeros(len(manifest.subject_shapes), np.int64)
        np.add.at(each, source.shapes[:, 1], source.shapes[:, 0])
        for number, subject in enumerate(manifest.subject_shapes):
            if not each[number]:
                continue
            at = of[d, number] = found.setdefault(shape_of(config, subject), len(found))
            if at == len(counts):
                counts.append(0)
                totals.append(0)
            counts[at] += int(each[number])
            totals[at] += int(each[number]) * cells_of(config, subject)
    held = tuple(total / max(count, 1) for total, count in zip(totals, counts, strict=True))
    return Classes(tuple(found), tuple(counts), held, of)


def sources_of(
    dataset: Dataset,
    split: str,
    classes: dict[tuple[int, int], int],
    weights: Sequence[float] = (),
    rows: Rows = None,
) -> list[Source]:
    """Sources of the plan: what it needs to know of each dataset's split.

    Args:
        classes: (dataset, index into its `Manifest.subject_shapes`) -> shape class.
    """
    found = []
    for d, source in enumerate(members(dataset, split, rows)):
        shapes = merged((count, classes[d, shape]) for count, shape in source.shapes.tolist())
        found.append(dataclasses.replace(source, shapes=shapes, weight=weights[d] if weights else 0.0))
    return found


def plan_of(config: RunConfig, dataset: Dataset, chosen: Buckets | None = None, rows: Rows = None) -> Plan:
    """The order of training on a dataset, and the shapes of its batches.

    Args:
        chosen: batch shapes that were chosen before for this configuration and dataset, as a run's driver hands them to
            its workers; None: the dataset is checked, and they are searched for.
        rows: training rows that are trained on alone.

    Raises:
        InputError: the dataset can't feed this configuration.
        KmtrError: it isn't the one that the batch shapes were chosen for.
    """
    if chosen is None:
        check_shapes(config, dataset)
    classes = shape_classes(config, dataset, rows=rows)
    batch = config.data.global_batch
    if chosen is None:
        chosen = _chosen(config.data, classes.shapes, classes.counts, config.plan.shapes, batch)
    elif not _fits(chosen, classes.shapes):
        raise KmtrError(
            f"data.root: expected the dataset whose {len(chosen.of_class)} shapes of subjects the run began with, got "
            f"one of {len(classes.shapes)}, which its batches don't fit; restore it, or start with run.fresh=true"
        )
    sources = sources_of(dataset, "train", classes.of, config.data.weights, rows)
    return Plan(sources, batch, config.seed, config.plan.tail, config.plan.window, chosen, rows)


@lru_cache(maxsize=8)
def _chosen(data: Data, shapes: tuple[Shape, ...], counts: tuple[int, ...], limit: int, batch: int) -> Buckets:
    """The search for batch shapes, which takes seconds and which a command asks for more than once."""
    return buckets.choose(shapes, counts, limit, batch, partial(cells_in, data))


def _fits(chosen: Buckets, classes: tuple[Shape, ...]) -> bool:
    """True if every class of subjects has a bucket that holds it."""
    return len(chosen.of_class) == len(classes) and all(
        size <= room
        for shape, bucket in zip(classes, chosen.of_class, strict=True)
        for size, room in zip(shape, chosen.shapes[bucket], strict=True)
    )


def padding_of(config: RunConfig, dataset: Dataset, plan: Plan) -> buckets.Waste:
    """Padding of the batches of an epoch, by shape."""
    assert plan.buckets is not None
    classes = shape_classes(config, dataset, rows=plan.rows)
    cells = partial(cells_in, config.data)
    return buckets.waste(plan.buckets, classes.shapes, classes.counts, plan.global_batch, cells, classes.held)
