"""Module of masked pretraining and alignment: both encoders, their decoders and projections, with the losses."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kmtr.config import MIN_TEMPERATURE, RunConfig
from kmtr.model.encoder import Encoded, line_decoder, line_encoder, patch_decoder, patch_encoder
from kmtr.model.tokenizers import encoder_inputs
from kmtr.model.transformer import Block
from kmtr.physics.cycle import static_dynamic
from kmtr.tasks.inputs import PASSES, Inputs
from kmtr.tasks.losses import masked_reconstruction
from kmtr.tasks.stages import image_encoder_learns, masks_images


class Pretraining(nn.Module):
    """Both encoders, both decoders and the projections of alignment: one module, so that one engine
    holds both stages.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        data, model = config.data, config.model
        self.config = config
        self.kspace_encoder = line_encoder(data, model)
        self.kspace_decoder = line_decoder(data, model)
        if config.has_image_encoder:
            self.image_encoder = patch_encoder(data, model)
            self.image_decoder = patch_decoder(data, model)
        width = {"static": model.width, "dynamic": 2 * model.width}
        if config.align.learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor([math.log(config.align.temperature - MIN_TEMPERATURE)]))
        self.kspace_heads = nn.ModuleDict({part: nn.Linear(w, model.projection) for part, w in width.items()})
        if config.has_image_encoder:
            self.image_heads = nn.ModuleDict({part: nn.Linear(w, model.projection) for part, w in width.items()})
        if config.train.compile:
            for module in self.modules():
                if isinstance(module, Block):
                    module.compiled()

    def forward(self, inputs: Inputs, stage: str) -> dict[str, Tensor]:
        """Per-subject losses ``kspace`` and ``image`` ``batch``; in alignment also ``z`` ``batch slice 4 channel``, and
        the ``temperature`` where it is learnt.

        z stacks (k-space static, k-space dynamic, image static, image dynamic), not yet normalised. Two stages of no
        loss: ``embed`` gives the ``embedding`` ``batch feature`` of `lines`, ``predict`` the ``values`` at
        `line_targets`. All goes through here, since ZeRO-3 gathers weights around an engine's call.
        """
        out: dict[str, Tensor] = {}
        if stage in ("embed", "predict"):
            encoded = self._encode(inputs, "lines")
            if stage == "embed":
                return {"embedding": torch.cat(static_dynamic(encoded.frames, encoded.absent), -1).flatten(1)}
            return {"values": self.kspace_decoder(encoded, inputs.line_targets)}
        loss = self.config.masked.kspace_loss
        aligned, learns = stage == "align", image_encoder_learns(self.config, stage)
        if not aligned or self.config.align.masked_weight:
            targets = inputs.line_targets
            predicted = self.kspace_decoder(self._encode(inputs, "lines"), targets)
            out["kspace"] = masked_reconstruction(
                predicted, targets.values, targets.lengths.counts, loss, targets.blank
            )
        if inputs.patches and inputs.patch_targets and masks_images(self.config, stage):
            targets = inputs.patch_targets
            predicted = self.image_decoder(self._encode(inputs, "patches"), targets)
            out["image"] = masked_reconstruction(predicted, targets.values, targets.lengths.counts)
        if aligned and inputs.all_lines is not None:
            z = self._project(self._encode(inputs, "all_lines"), self.kspace_heads)
            if inputs.clean is not None:
                z += list(inputs.clean.to(z[0].dtype).unbind(2))
            else:
                with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
                    patches = self._encode(inputs, "all_patches", whole=not learns)
                z += self._project(patches, self.image_heads)
            out["z"] = torch.stack(z, dim=2)
            if self.config.align.learn_temperature:
                # Learnt as a logarithm, as in CLIP (Radford 2021), above a floor that never stops its gradient.
                out["temperature"] = MIN_TEMPERATURE + self.log_temperature[0].float().exp()
        return out

    @staticmethod
    def _project(encoded: Encoded, heads: nn.ModuleDict) -> list[Tensor]:
        """Projections of the static and the dynamic part, each ``batch slice channel``."""
        parts = static_dynamic(encoded.frames, encoded.absent)
        pairs = zip((heads["static"], heads["dynamic"]), parts, strict=True)
        return [head(x.to(encoded.vectors.dtype)) for head, x in pairs]

    def _encode(self, inputs: Inputs, kind: str, whole: bool = False) -> Encoded:
        """One of `PASSES` through the encoder of its domain; `whole`: at full depth."""
        lines = kind.endswith("lines")
        encoder = self.kspace_encoder if lines else self.image_encoder
        cells = (inputs.cells, inputs.absent) if lines else (inputs.patch_cells, inputs.absent_patches)
        draws = None if inputs.draws is None or whole else inputs.draws[:, PASSES.index(kind)]
        tokens = getattr(inputs, kind)
        shown = inputs.all_zerofilled if kind == "all_lines" else inputs.zerofilled
        read = encoder_inputs(self.config.model, tokens, shown) if lines else [tokens]
        encoded: Encoded = encoder(read, *cells, draws)
        return encoded
