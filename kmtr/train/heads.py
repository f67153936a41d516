"""Heads before the first step: regressions on the vectors of the system that a run on labels begins from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader import pipeline, subjects
from kmtr.data.loader.batch import Wanted
from kmtr.data.loader.order import permutation
from kmtr.tasks import Model, Preparer
from kmtr.tasks.base import EMBEDDING, world
from kmtr.train.agreed import together
from kmtr.types import KmtrError

MOST = 2048
"""Labelled subjects that the regressions are of at most."""
CHUNK = 16
"""Subjects encoded at once."""


@torch.no_grad()
def begin(
    model: Model,
    prepare: Preparer,
    config: RunConfig,
    reader: Reader,
    rows: Sequence[int] | None,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Give each head the weights that `Task.begin` has for it, the same on all workers, who share the encoding. Nothing
    is done where no task of the run has any, or `task.begin` is not ``probe``.

    Args:
        model: on any device; it is moved to `device`.
        rows: of the training split, whose labels count; None: all.
        say: is told, before it takes its time, how many subjects are encoded.

    Raises:
        KmtrError: on all workers: damaged data, or a vector that is not finite.
    """
    asked = [name for name, task in prepare.tasks.items() if task.begins]
    if config.stage != "task" or config.task.begin != "probe" or not asked:
        return
    known = list(range(len(reader))) if rows is None else [int(row) for row in rows]
    has = np.isfinite(subjects.labels_of(reader, known, prepare.labels)).any(1)
    labelled = [row for row, one in zip(known, has, strict=True) if one]
    some = [labelled[i] for i in permutation(config.seed, 0, len(labelled))[:MOST]]
    say(f"  step      0  heads begin  as regressions on {len(some)} labelled subjects: {', '.join(asked)}")
    model.to(device).eval()
    vectors, labels = _encoded(model, prepare, config, reader, some, device)
    given = prepare.given()
    for name in asked:
        if not dist.is_initialized() or dist.get_rank() == 0:
            prepare.tasks[name].begin(model.heads[name], vectors, labels, given)
        if world() > 1:
            for weights in model.heads[name].parameters():
                dist.broadcast(weights, 0)
    model.train()


def _encoded(
    model: Model, prepare: Preparer, config: RunConfig, reader: Reader, rows: Sequence[int], device: torch.device
) -> tuple[Float[Tensor, "subject channel"], Float[Tensor, "subject label"]]:
    """Vectors of these training subjects and their labels, on every worker. R is drawn as in the first epoch, patterns
    as for validation; nothing is augmented.
    """
    ranks, rank = world(), dist.get_rank() if dist.is_initialized() else 0
    each = -(-len(rows) // ranks)
    mine = [rows[i % len(rows)] for i in range(rank, each * ranks, ranks)]  # a few twice, so that all have as many

    def encode() -> Tensor:
        parts = []
        for host in pipeline.read_in_order(reader, mine, CHUNK, config, Wanted(prepare.labels)):
            batch = host.to(device)
            vector = model(prepare.embedding(batch, config.task.system))[EMBEDDING]["vector"].float()
            if not torch.isfinite(vector).all():
                raise KmtrError("task.encoder: the system's vectors are not finite before the first step")
            parts.append(torch.cat([vector, batch.labels.to(vector)], 1))
        return torch.cat(parts)

    here = together(encode, device) if dist.is_initialized() else encode()
    everything = [torch.empty_like(here) for _ in range(ranks)] if ranks > 1 else [here]
    if ranks > 1:
        dist.all_gather(everything, here)
    joined = torch.stack(everything, 1).flatten(0, 1)[: len(rows)]  # back in the order of `rows`
    vectors, labels = joined.split([joined.shape[1] - len(prepare.labels), len(prepare.labels)], 1)
    return vectors, labels
