"""Masked pretraining: hidden lines, and hidden image patches, are predicted from those that are left."""

from __future__ import annotations

from collections.abc import Sequence

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.tasks.base import Engine, Step, Sums, share, weigh
from kmtr.tasks.inputs import Preparer


def step(engine: Engine, micro: Sequence[Batch], prepare: Preparer, config: RunConfig) -> Step:
    """Masked pretraining: loss on hidden lines plus `image_weight` times that on hidden patches."""
    total = Sums()
    for batch in micro:
        out = engine(prepare(batch, "masked"), "masked")
        loss = weigh(out, {"kspace": 1.0, "image": config.masked.image_weight})
        real = ~batch.repeated
        total.add("kspace_loss", out["kspace"], real)
        if "image" in out:
            total.add("image_loss", out["image"], real)
        total.add("loss", loss, real)
        engine.backward((loss * real).sum() * share(batch, len(micro)))
    return total.step()
