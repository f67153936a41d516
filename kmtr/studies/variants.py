"""Variants that the ablation compares: choices of pretraining, each against the recipe's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kmtr.config import RunConfig, keys
from kmtr.types import InputError


@dataclass(frozen=True)
class Group:
    """Variants that answer one question.

    Attributes:
        stage: the encoder that is scored: after masked pretraining (``masked``), or after alignment too (``both``).
        variants: name -> dotted keys that it changes. One that changes nothing of the recipe is the recipe itself, and
            no run of its own.
    """

    name: str
    asks: str
    variants: Mapping[str, Mapping[str, Any]]
    stage: Literal["masked", "both"] = "masked"


GROUPS = (
    Group(
        "normalisation",
        "By what power of the population's SD are lines divided, and are static and dynamic parts set apart?",
        {
            "power 0": {"model.normalisation_power": 0.0},
            "power 0.5": {"model.normalisation_power": 0.5},
            "power 1": {"model.normalisation_power": 1.0},
            "each line": {"model.normalisation": "line"},
            "none": {"model.normalisation": "none"},
            "whole lines": {"model.line_parts": "whole"},
        },
    ),
    Group(
        "line tokens",
        "A line along kx, or as what it is along x?",
        {name: {"model.readout": name} for name in ("kspace", "hybrid")},
    ),
    Group(
        "target",
        "Are the hidden acquired lines predicted, or all that the encoder does not see?",
        {name: {"masked.target": name} for name in ("acquired", "all")},
    ),
    Group(
        "k-space loss",
        "Which error of hidden lines?",
        {name: {"masked.kspace_loss": name} for name in ("mse", "l1", "hdr")},
    ),
    Group(
        "mask ratio",
        "How many of the acquired lines are hidden from the encoder?",
        {f"{ratio}": {"masked.mask_ratio": ratio} for ratio in (0.3, 0.5, 0.7, 0.9)},
    ),
    Group(
        "image domain",
        "Does reconstructing images beside k-space cost or help the k-space encoder?",
        {"with": {"masked.image_weight": 1.0}, "without": {"masked.image_weight": 0.0}},
    ),
    Group(
        "encoder inputs",
        "Does the encoder read lines, patches of their zero-filled image, or both?",
        {name: {"model.encoder_inputs": name} for name in ("kspace", "zerofilled", "both")},
    ),
    Group(
        "alignment",
        "Which part of alignment matters?",
        {
            "as it is": {},
            "static alone": {"align.dynamic_weight": 0.0},
            "dynamic alone": {"align.static_weight": 0.0},
            "without the masked loss": {"align.masked_weight": 0.0},
            "projections not first": {"align.head_steps": 0, "align.head_factor": 1.0},
        },
        stage="both",
    ),
    Group(
        "image side",
        "Is k-space aligned with fixed components of the clean image, or with an image encoder, frozen or trained?",
        {
            "components": {"align.teacher": "components", "align.train_image_encoder": False},
            "frozen encoder": {"align.teacher": "encoder", "masked.image_weight": 1.0},
            "trained encoder": {
                "align.teacher": "encoder",
                "align.train_image_encoder": True,
                "masked.image_weight": 1.0,
            },
        },
        stage="both",
    ),
)


def asked(config: RunConfig) -> tuple[Group, ...]:
    """Those of `study.groups`, all where it names none.

    Raises:
        InputError: a group that does not exist.
    """
    names = {group.name for group in GROUPS}
    for name in config.study.groups:
        if name not in names:
            raise InputError(f"study.groups: expected some of {', '.join(sorted(names))}, got {name!r}")
    return tuple(group for group in GROUPS if not config.study.groups or group.name in config.study.groups)


def check(groups: tuple[Group, ...], config: RunConfig) -> None:
    """Check that all keys exist: a misspelt one would be a table full of failures.

    Raises:
        InputError: names group, variant and key.
    """
    known = {key for key, _ in keys(config)}
    for group in groups:
        for name, changes in group.variants.items():
            for key in changes:
                if key not in known:
                    raise InputError(f"study: group {group.name!r}, variant {name!r}: unknown key {key!r}")
