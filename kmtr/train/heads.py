"""Heads before the first step: regressions on the vectors of the system that a run on labels begins from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader import pipeline
from kmtr.data.loader.batch import Wanted
from kmtr.data.loader.order import permutation
from kmtr.tasks import Model, Preparer
from kmtr.tasks.base import EMBEDDING, world

MOST, CHUNK = 2048, 16
"""Subjects that the regressions are of at most, and how many of them are encoded at once."""


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
    is done where the run asks for no such beginning, or has no labels.

    Args:
        model: on any device; it is moved to `device`.
        rows: of the training split, whose labels count; None: all.
        say: is told, before it takes its time, how many subjects are encoded.
    """
    if config.stage != "task" or config.task.begin != "probe" or not prepare.labels:
        return
    known = range(len(reader)) if rows is None else [int(row) for row in rows]
    some = [known[i] for i in permutation(config.seed, 0, len(known))[:MOST]]
    say(f"  step      0  heads begin  as regressions on the vectors of {len(some)} labelled subjects")
    model.to(device).eval()
    vectors, labels = _encoded(model, prepare, config, reader, some, device)
    given = prepare.given()
    for name, task in prepare.tasks.items():
        if task.labels:
            if not dist.is_initialized() or dist.get_rank() == 0:
                task.begin(model.heads[name], vectors, labels, given)
            if world() > 1:
                for weights in model.heads[name].parameters():
                    dist.broadcast(weights, 0)
    model.train()


def _encoded(
    model: Model, prepare: Preparer, config: RunConfig, reader: Reader, rows: Sequence[int], device: torch.device
) -> tuple[Float[Tensor, "subject channel"], Float[Tensor, "subject label"]]:
    """Vectors of these training subjects and their labels, R and patterns as in the first epoch, on every worker."""
    ranks, rank = world(), dist.get_rank() if dist.is_initialized() else 0
    most = -(-len(rows) // ranks)
    mine = [rows[i % len(rows)] for i in range(rank, most * ranks, ranks)]  # a few twice, so that all have as many
    parts = []
    for host in pipeline.read_in_order(reader, mine, CHUNK, config, Wanted(prepare.labels)):
        batch = host.to(device)
        vector = model(prepare.embedding(batch, config.task.system))[EMBEDDING]["vector"].float()
        parts.append(torch.cat([vector, batch.labels.to(vector)], 1))
    here = torch.cat(parts)
    everything = [torch.empty_like(here) for _ in range(ranks)] if ranks > 1 else [here]
    if ranks > 1:
        dist.all_gather(everything, here)
    joined = torch.stack(everything, 1).flatten(0, 1)[: len(rows)]  # back in the order of `rows`
    vectors, labels = joined.split([joined.shape[1] - len(prepare.labels), len(prepare.labels)], 1)
    return vectors, labels
