"""Tasks: masked pretraining and alignment, each a function of an engine and the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.tasks import align, masked
from kmtr.tasks.base import Engine, Step
from kmtr.tasks.inputs import Inputs, Preparer
from kmtr.tasks.stages import image_encoder_learns, masks_images, reads_images

STAGES: dict[str, Callable[[Engine, Sequence[Batch], Preparer, RunConfig], Step]] = {
    "masked": masked.step,
    "align": align.step,
}

__all__ = [
    "STAGES",
    "Engine",
    "Inputs",
    "Preparer",
    "Step",
    "image_encoder_learns",
    "masks_images",
    "reads_images",
]
