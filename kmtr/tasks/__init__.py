"""What is learnt: masked pretraining and alignment, each a function of an engine and the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kmtr.config import RunConfig
from kmtr.data.batch import Batch
from kmtr.tasks.align import align
from kmtr.tasks.base import Engine, Step
from kmtr.tasks.inputs import Inputs, Preparer
from kmtr.tasks.masked import reconstruct
from kmtr.tasks.stages import image_encoder_learns, masks_images, reads_images

STAGES: dict[str, Callable[[Engine, Sequence[Batch], Preparer, RunConfig], Step]] = {
    "reconstruct": reconstruct,
    "align": align,
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
