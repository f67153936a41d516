"""Inputs of a model from a batch: visible and hidden lines and patches as tokens, made in fp32 outside the engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.model.packing import Lengths, Places
from kmtr.model.packing import gather as gather_places
from kmtr.model.teacher import Components
from kmtr.model.tokenizers import LineTokenizer, PatchTokenizer, Tokens
from kmtr.physics import random
from kmtr.physics.cycle import SIDE
from kmtr.physics.lines import CENTRE
from kmtr.tasks.stages import masks_images, reads_images


@dataclass(frozen=True)
class Inputs:
    """One micro-batch as the model sees it, made in fp32 outside the engine.

    Attributes:
        lines, line_targets: visible lines and those to predict; the visible ones never depend on any other.
        patches, patch_targets: visible and hidden image patches; None where only lines are asked for.
        all_lines, all_patches: everything acquired, for alignment; None in masked pretraining.
        zerofilled, all_zerofilled: patches of what `lines` and `all_lines` show, where the k-space encoder reads them.
        cells, patch_cells: frame slots that hold data, in the frames of either domain.
        absent, absent_patches: those that do not.
        clean: static and dynamic components of the clean image, where they are alignment's teacher.
        draws: uniform numbers for stochastic depth, of `PASSES`; None: nothing is left out.
    """

    lines: Tokens
    line_targets: Tokens
    patches: Tokens | None
    patch_targets: Tokens | None
    all_lines: Tokens | None
    all_patches: Tokens | None
    cells: Places
    patch_cells: Places
    absent: Bool[Tensor, "batch slice t"]
    absent_patches: Bool[Tensor, "batch slice pt"]
    clean: Float[Tensor, "batch slice part channel"] | None = None
    draws: Float[Tensor, "batch pass block 2"] | None = None
    zerofilled: Tokens | None = None
    all_zerofilled: Tokens | None = None


PASSES = ("lines", "patches", "all_lines", "all_patches")
"""Tokens that an encoder reads; each pass draws its own depth."""


class Preparer:
    """Batch -> Inputs: undersampling, images, hiding and normalisation, on the batch's device, without gradient."""

    def __init__(self, config: RunConfig, tables: dict[str, Tensor], device: torch.device):
        self.config = config
        self.lines = LineTokenizer(config.data, config.model, tables, device)
        self.patches = PatchTokenizer(config.data, config.model, tables, device)
        self.components = Components(tables, device) if config.has_components else None

    def readout(self, stage: str) -> int | None:
        """Central kx samples of a batch that a stage looks at; None: all, since it needs images."""
        if reads_images(self.config, stage) or self.config.model.encoder_inputs != "kspace":
            return None
        return max(self.lines.samples, CENTRE, SIDE if stage == "align" else 0)

    @torch.no_grad()
    def __call__(self, batch: Batch, stage: str) -> Inputs:
        seen, visible = batch.sampled, batch.sampled & ~batch.hidden
        absent_patches = batch.padded.unflatten(2, (-1, self.config.model.patch[0])).all(-1)
        present = self.patches.present(batch)
        shown, withheld = present & ~batch.hidden_patches, present & batch.hidden_patches
        absent = self.on_grid(batch.padded, batch.slots)
        absent_patches = self.on_grid(absent_patches, batch.slots, self.config.model.patch[0])
        chosen = [visible, batch.targets, seen, shown, withheld, present, ~absent, ~absent_patches]
        many = Lengths.of(chosen)  # all at once: each question makes the host wait for the device
        both, imaged = stage == "align", self.config.model.encoder_inputs != "kspace"
        patches = patch_targets = all_patches = None
        if reads_images(self.config, stage):
            images = self.patches.images(batch)
            if masks_images(self.config, stage):
                patches = self.patches(batch, images, shown, many[3])
                patch_targets = self.patches(batch, images, withheld, many[4])
            if both:
                all_patches = self.patches(batch, images, present, many[5])
        known = batch.acquired if self.config.masked.target == "all" else seen
        return Inputs(
            lines=self.lines(batch, known=visible, chosen=visible, lengths=many[0]),
            line_targets=self.lines(batch, known=known, chosen=batch.targets, visible=visible, lengths=many[1]),
            patches=patches,
            patch_targets=patch_targets,
            all_lines=self.lines(batch, known=seen, chosen=seen, lengths=many[2]) if both else None,
            all_patches=all_patches,
            cells=gather_places(~absent, many[6]),
            patch_cells=gather_places(~absent_patches, many[7]),
            absent=absent,
            absent_patches=absent_patches,
            clean=self.components(batch) if both and self.components else None,
            draws=self.draws(batch),
            zerofilled=self.patches.zerofilled(batch, visible, many[5]) if imaged else None,
            all_zerofilled=self.patches.zerofilled(batch, seen, many[5]) if imaged and both else None,
        )

    def draws(self, batch: Batch) -> Float[Tensor, "batch pass block 2"] | None:
        """Uniform numbers of (seed, epoch, subject), so that neither workers nor recomputation change them."""
        model = self.config.model
        if batch.epoch is None or not model.drop_path:
            return None
        shape = (len(PASSES), model.depth, 2)
        return random.uniform(self.config.seed, batch.epoch, batch.key, random.DEPTH, shape)

    def on_grid(self, absent: Bool[Tensor, "batch slice t"], slots: tuple[int, ...], every: int = 1) -> Tensor:
        """True where a (slice, t) of the configuration's grid of frame vectors has no data, bool ``batch slice t``."""
        whole = absent.new_ones(len(absent), self.config.data.slices, self.config.data.frames // every)
        whole[:, torch.tensor(slots, device=absent.device), : absent.shape[2]] = absent
        return whole

    @torch.no_grad()
    def queries(self, batch: Batch, queried: Bool[Tensor, "batch slice t ky"] | None = None) -> Inputs:
        """All acquired lines as input; as targets the positions to predict (their values are of no use)."""
        seen = batch.sampled
        lines = self.lines(batch, known=seen, chosen=seen)
        targets = lines if queried is None else self.lines(batch, known=seen, chosen=queried)
        absent = self.on_grid(batch.padded, batch.slots)
        cells = gather_places(~absent)
        zerofilled = None if self.config.model.encoder_inputs == "kspace" else self.patches.zerofilled(batch, seen)
        return Inputs(lines, targets, None, None, None, None, cells, cells, absent, absent, zerofilled=zerofilled)
