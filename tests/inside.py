"""Inputs and outputs of a model by short names, for tests that look inside."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor, nn

from kmtr.data.loader.batch import Batch
from kmtr.tasks import STAGES, Inputs, Preparer


def prepared(prepare: Preparer, batch: Batch, stage: str) -> Inputs:
    """Inputs of a stage of this name."""
    return prepare(batch, STAGES[stage](prepare.config))


def shown(inputs: Inputs) -> SimpleNamespace:
    """Tokens and places of the inputs: ``lines`` and ``line_targets``, ``patches`` and ``patch_targets`` of masked
    pretraining, ``all_lines`` and ``all_patches`` of alignment, the ``cells`` and ``absent`` of both domains, and
    ``zerofilled`` where the k-space encoder reads patches (None each: not there).
    """
    masked, images, align = (inputs.tasks.get(name) for name in ("masked", "masked_images", "align"))
    lines = masked and masked.shown.arguments
    patches = images and images.shown.arguments
    every, whole = align and align.lines.arguments, align and align.teacher.arguments
    kspace = lines or every
    taught = whole if align and align.teacher.system == "image" else None
    image = patches or taught
    return SimpleNamespace(
        lines=lines and lines[0][0],
        line_targets=masked and masked.targets,
        patches=patches and patches[0][0],
        patch_targets=images and images.targets,
        all_lines=every and every[0][0],
        all_patches=taught and taught[0][0],
        clean=whole[0] if align and taught is None else None,
        zerofilled=lines and lines[0][-1],
        all_zerofilled=every and every[0][-1],
        cells=kspace and kspace[1],
        absent=kspace[2] if kspace else None,
        draws=kspace[3] if kspace else None,
        patch_cells=image and image[1],
        absent_patches=image[2] if image else None,
    )


def terms(module: nn.Module, prepare: Preparer, batch: Batch, stage: str) -> dict[str, Tensor]:
    """What a model says of a stage: ``kspace`` and ``image`` per subject, and of alignment ``z``, ``temperature``."""
    return flat(module(prepared(prepare, batch, stage)))


def flat(outputs: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    labels = {"masked": "kspace", "masked_images": "image"}
    found = {label: outputs[name]["loss"] for name, label in labels.items() if name in outputs}
    return found | {name: x for name, x in outputs.get("align", {}).items() if name != "present"}
