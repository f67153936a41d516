"""Encoders and inputs of each stage, defined once."""

from __future__ import annotations

from kmtr.config import RunConfig


def image_encoder_learns(config: RunConfig, stage: str) -> bool:
    """True if the image encoder is trained in a stage; else it is a teacher, frozen, that sees whole images."""
    return stage != "align" or config.align.train_image_encoder


def masks_images(config: RunConfig, stage: str) -> bool:
    """True if hidden image patches are predicted in a stage."""
    return bool(config.masked.image_weight) and image_encoder_learns(config, stage)


def reads_images(config: RunConfig, stage: str) -> bool:
    """True if an encoder reads clean images in a stage."""
    teaches = stage == "align" and (config.align.teacher == "encoder" or config.align.train_image_encoder)
    return teaches or masks_images(config, stage)
