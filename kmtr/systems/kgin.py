"""k-GIN: a transformer that fills in the lines of k-space which were not acquired (Pan et al., arXiv 2307.12672)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from kmtr.config import RunConfig
from kmtr.data.loader.batch import Batch
from kmtr.inputs import Shared, existing, whole_cycle
from kmtr.model.packing import Lengths, Pending, Places, gather
from kmtr.model.transformer import Block
from kmtr.physics.fourier import crop_or_pad
from kmtr.systems.base import Reading
from kmtr.systems.xf import KSpace, Reconstructed
from kmtr.types import InputError

PATCH = 4
"""Samples along ky and kx of a token of the last refinement."""
Slices = Complex[Tensor, "row coil t ky kx"]


def envelope(matrix: tuple[int, int]) -> Float[Tensor, "ky kx"]:
    """Fall of k-space's magnitude from its centre, 1 over the distance (Field 1987), of unit mean square: what numbers
    are divided by before the networks see them, so that the centre does not drown the rest.
    """
    ky, kx = (torch.arange(n) - n // 2 for n in matrix)
    fall = 1 / (1 + (ky[:, None] ** 2 + kx**2).sqrt())
    return fall / fall.square().mean().sqrt()


class Tokens(nn.Module):
    """Pieces of k-space as tokens of a transformer, and what it adds to them, zero at step 0.

    Args:
        features: real numbers of a piece.
        pieces: of a slice.
    """

    def __init__(self, features: int, pieces: int, width: int, depth: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.position = nn.Parameter(torch.randn(pieces, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, features)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, values: Float[Tensor, "row piece feature"], more: Float[Tensor, "row piece channel"] | None = None
    ) -> Float[Tensor, "row piece feature"]:
        """Numbers to be added to the pieces, fp32.

        Args:
            more: is added to the tokens.
        """
        x = self.embed(values.to(self.embed.weight.dtype)) + self.position
        x = x if more is None else x + more
        rows, pieces = x.shape[:2]
        lengths = Lengths((pieces,) * rows, torch.full((rows,), pieces, device=x.device))
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x, lengths)
        return self.out(self.norm(x)).float().unflatten(0, (rows, pieces))


class LineEncoder(nn.Module):
    """Transformer over the acquired lines of a slice, a token each, in the recipe's width."""

    def __init__(self, config: RunConfig):
        super().__init__()
        data, model = config.data, config.model
        self.coils, self.lines = data.coils, data.matrix[0]
        self.embed = nn.Linear(2 * self.coils * data.matrix[1], model.width)
        # A module of its own: ZeRO-3 gathers weights for the backward pass only where the output is a tensor.
        self.position = nn.Embedding(data.frames * self.lines, model.width)
        nn.init.normal_(self.position.weight, std=0.02)
        heads = model.width // model.head_width
        self.blocks = nn.ModuleList(Block(model.width, heads, model.mlp_ratio) for _ in range(model.depth))
        self.norm = nn.LayerNorm(model.width)

    def encode(self, rows: Slices, places: Places) -> Float[Tensor, "token channel"]:
        """Tokens after the last block.

        Args:
            rows: slices with the coils of the configuration.
            places: (t, ky) of the acquired lines of each.
        """
        t, ky = places.index.unbind(-1)
        lines = torch.view_as_real(rows[places.lengths.subject, :, t, ky]).flatten(1)
        x = self.embed(lines.to(self.embed.weight.dtype)) + self.position(t * self.lines + ky)
        for block in self.blocks:
            x = block(x, places.lengths)
        found: Tensor = self.norm(x)
        return found


def by_slice(
    kspace: KSpace, sampled: Bool[Tensor, "batch slice t ky"], envelope: Float[Tensor, "ky kx"], coils: int
) -> tuple[Complex[Tensor, "row any t ky kx"], Bool[Tensor, "row t ky"]]:
    """Slices as rows, all subjects of the first slice first, over the envelope, filled up with empty coils; and what of
    them is sampled.
    """
    rows = kspace.transpose(0, 1).flatten(0, 1) / envelope
    rows = nn.functional.pad(rows, (0, 0, 0, 0, 0, 0, 0, coils - kspace.shape[2]))
    return rows, sampled.transpose(0, 1).flatten(0, 1)


def pooled(x: Float[Tensor, "token channel"], lengths: Lengths) -> Float[Tensor, "row channel"]:
    """Mean of each slice's tokens, 0 without any."""
    # Not index_add: its order of summation, and so the last bit, is left to chance on a GPU.
    summed = x.new_zeros(len(lengths.host), x.shape[1]).index_put((lengths.subject,), x, accumulate=True)
    return summed / lengths.counts.clamp(min=1)[:, None]


class Interpolation(LineEncoder):
    """Encoder of the acquired lines of a slice, decoder of all of them, and three refinements: along (t, ky), along
    (t, kx), and of patches of (ky, kx). Acquired lines are put back before and after each.

    Begins at the k-space that it is given.
    """

    def __init__(self, config: RunConfig):
        super().__init__(config)
        data, model = config.data, config.model
        (ny, nx), frames = data.matrix, data.frames
        if ny % PATCH or nx % PATCH:
            raise InputError(f"data.matrix: expected multiples of {PATCH} for task.system=kgin, got {data.matrix}")
        line = 2 * self.coils * nx
        self.memory = nn.Linear(model.width, model.decoder_width)

        def decoder(features: int, pieces: int) -> Tokens:
            width = model.decoder_width
            return Tokens(features, pieces, width, model.decoder_depth, width // model.head_width, model.mlp_ratio)

        self.decoder = decoder(line, frames * ny)
        self.refine = nn.ModuleList(
            [
                decoder(line, frames * ny),
                decoder(2 * self.coils * ny, frames * nx),
                decoder(2 * self.coils * frames * PATCH**2, ny * nx // PATCH**2),
            ]
        )

    def forward(
        self,
        kspace: KSpace,
        sampled: Bool[Tensor, "batch slice t ky"],
        present: Bool[Tensor, "batch slice"],
        exists: Bool[Tensor, "batch slice ky kx"],
        envelope: Float[Tensor, "ky kx"],
        lengths: Lengths,
    ) -> Reconstructed:
        """
        Args:
            kspace: all lines of all frames; those that are not `sampled` are a first guess.
            present: slices that hold data.
            exists: samples that a slice's scan has (`inputs.existing`); the others stay as they are.
            lengths: acquired lines of each slice, all subjects of the first slice first.
        """
        shape = kspace.shape
        rows, mask = by_slice(kspace, sampled, envelope, self.coils)
        known = mask[:, None, :, :, None] | ~exists.transpose(0, 1).flatten(0, 1)[:, None, None]

        places = gather(mask, lengths)
        row, (t, ky) = lengths.subject, places.index.unbind(-1)
        x = self.encode(rows, places)
        seen = self.memory(x)
        heard = seen.new_zeros(*mask.shape, seen.shape[-1]).index_put((row, t, ky), seen).flatten(1, 2)
        added = self.decoder(_lines(torch.where(mask[:, None, :, :, None], rows, 0)), heard)
        found = torch.where(known, rows, rows + _from_lines(added, rows.shape))
        for refine, (apart, together) in zip(self.refine, PLANES, strict=True):
            found = torch.where(known, rows, found + together(refine(apart(found)), rows.shape))
        found = (found[:, : shape[2]] * envelope).unflatten(0, (shape[1], shape[0])).transpose(0, 1)
        keep = sampled[:, :, None, :, :, None] | ~exists[:, :, None, None]
        found = torch.where(keep, kspace, found)  # neither divided nor multiplied
        mean = pooled(x.float(), lengths).unflatten(0, (shape[1], shape[0])).transpose(0, 1)
        return Reconstructed(found, mean[..., None, None], present)


def _lines(k: Slices) -> Float[Tensor, "row piece feature"]:
    return torch.view_as_real(k.permute(0, 2, 3, 1, 4)).flatten(3).flatten(1, 2)


def _from_lines(values: Float[Tensor, "row piece feature"], shape: Sequence[int]) -> Slices:
    _, coils, t, ky, kx = shape
    return _complex(values, (t, ky, coils, kx)).permute(0, 3, 1, 2, 4)


def _columns(k: Slices) -> Float[Tensor, "row piece feature"]:
    return torch.view_as_real(k.permute(0, 2, 4, 1, 3)).flatten(3).flatten(1, 2)


def _from_columns(values: Float[Tensor, "row piece feature"], shape: Sequence[int]) -> Slices:
    _, coils, t, ky, kx = shape
    return _complex(values, (t, kx, coils, ky)).permute(0, 3, 1, 4, 2)


def _patches(k: Slices) -> Float[Tensor, "row piece feature"]:
    split = k.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # row coil t py a px b
    return torch.view_as_real(split.permute(0, 3, 5, 1, 2, 4, 6)).flatten(3).flatten(1, 2)


def _from_patches(values: Float[Tensor, "row piece feature"], shape: Sequence[int]) -> Slices:
    _, coils, t, ky, kx = shape
    split = _complex(values, (ky // PATCH, kx // PATCH, coils, t, PATCH, PATCH))
    return split.permute(0, 3, 4, 1, 5, 2, 6).flatten(5, 6).flatten(3, 4)


def _complex(values: Float[Tensor, "row piece feature"], shape: Sequence[int]) -> Tensor:
    return torch.view_as_complex(values.reshape(len(values), *shape, 2))


PLANES = ((_lines, _from_lines), (_columns, _from_columns), (_patches, _from_patches))
"""Pieces of each refinement: k-space to tokens, and back."""


class KGINReader:
    """Batch -> temporally shared k-space of all frames of the configuration, in which acquired lines are as they were,
    of unit RMS.
    """

    readout = None

    def __init__(self, config: RunConfig, device: torch.device):
        self.matrix, self.frames = config.data.matrix, config.data.frames
        self.envelope = envelope(self.matrix).to(device)

    def __call__(
        self, batch: Batch, shown: Tensor | None = None, number: int = 0, learns: bool = True
    ) -> Pending[Reading]:
        """All that was acquired; nothing of it can be hidden."""
        whole = whole_cycle(batch, self.frames)
        sampled = crop_or_pad(whole.sampled, self.matrix[:1], (-1,))

        def make(lengths: Sequence[Lengths]) -> Reading:
            each = Lengths.joined(lengths)
            kspace, exists = Shared.of(whole, self.matrix).kspace, existing(batch, self.matrix)
            return Reading("kgin", (kspace, sampled, ~batch.padded.all(-1), exists, self.envelope, each), learns)

        return Pending(tuple(sampled[:, z] for z in range(sampled.shape[1])), make)


class KGIN:
    """`kgin` of `task.system`. Its features are `Reconstructed`."""

    inputs, tokens = ("acquired",), False
    unit: Literal["rms of the temporally shared image"] = "rms of the temporally shared image"

    def module(self, config: RunConfig) -> nn.Module:
        return Interpolation(config)

    def channels(self, config: RunConfig) -> int:
        return config.model.width

    def reader(self, config: RunConfig, tables: Mapping[str, Tensor], device: torch.device) -> KGINReader:
        return KGINReader(config, device)
