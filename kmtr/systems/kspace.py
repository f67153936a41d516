"""The k-space encoder: acquired lines, patches of their zero-filled image, or both, as tokens of a transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.model.encoder import line_encoder, on_grid
from kmtr.model.packing import Lengths, Pending, gather
from kmtr.model.tokenizers import Centre, LineTokenizer, PatchTokenizer, Tokens
from kmtr.physics.lines import CENTRE
from kmtr.systems.base import Reading, depth_draws


class LineReader:
    """Batch -> tokens of the lines that are shown; what is not shown changes no bit of them.

    Attributes:
        lines: tokens of lines, and back.
    """

    def __init__(self, config: RunConfig, tables: Mapping[str, Tensor], device: torch.device):
        self.config = config
        self.lines = LineTokenizer(config.data, config.model, dict(tables), device)
        self.patches = PatchTokenizer(config.data, config.model, dict(tables), device)
        self.centre = Centre(config.model, dict(tables), device) if config.model.centre else None
        self.reads_lines = config.model.encoder_inputs != "zerofilled"
        self.reads_patches = config.model.encoder_inputs != "kspace"

    @property
    def readout(self) -> int | None:
        return None if self.reads_patches else max(self.lines.samples, CENTRE, self.config.model.centre)

    def __call__(
        self,
        batch: Batch,
        shown: Bool[Tensor, "batch slice t ky"] | None = None,
        number: int = 0,
        learns: bool = True,
    ) -> Pending[Reading]:
        """Tokens of the `shown` lines, all `sampled` ones where not given."""
        lines = batch.sampled if shown is None else shown
        absent = on_grid(batch.padded, batch.slots, (self.config.data.slices, self.config.data.frames))
        cells = [~absent]
        cells += [lines] if self.reads_lines else []
        cells += [self.patches.present(batch)] if self.reads_patches else []

        low = None if self.centre is None else self._low(batch, lines, self.centre)

        def make(lengths: Sequence[Lengths]) -> Reading:
            kinds: list[Tokens] = []
            if self.reads_lines:
                kinds.append(self.lines(batch, known=lines, chosen=lines, lengths=lengths[1]))
            if self.reads_patches:
                kinds.append(self.patches.zerofilled(batch, lines, lengths[-1]))
            draws = depth_draws(self.config, batch, number) if learns else None
            return Reading("kspace", (kinds, gather(cells[0], lengths[0]), absent, draws, low), learns)

        return Pending(tuple(cells), make)

    def _low(self, batch: Batch, shown: Tensor, centre: Centre) -> Float[Tensor, "batch slice t pixel"]:
        """What is seen at low resolution, on the whole grid of the configuration."""
        seen, data = centre(batch, shown), self.config.data
        whole = seen.new_zeros(len(batch), data.slices, data.frames, seen.shape[-1])
        whole[:, list(batch.slots), : seen.shape[2]] = seen
        return whole


class KSpaceEncoder:
    """`kspace` of `task.system`: k-MTR's own encoder. Its features are `model.encoder.Encoded`."""

    inputs, tokens = ("acquired",), True

    def module(self, config: RunConfig) -> nn.Module:
        return line_encoder(config.data, config.model)

    def channels(self, config: RunConfig) -> int:
        return 3 * (config.model.width + config.model.centre**2) * config.data.slices

    def reader(self, config: RunConfig, tables: Mapping[str, Tensor], device: torch.device) -> LineReader:
        return LineReader(config, tables, device)
