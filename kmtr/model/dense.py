"""Heads of dense outputs: a number or several for every pixel of chosen frames, from an encoder's tokens or maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kmtr.config import Data, Model
from kmtr.model.encoder import Encoded, Grid, Position
from kmtr.model.packing import Lengths, Places, join
from kmtr.model.transformer import Block

HALF = 2
"""Pixels of the output along each side of a pixel in which the convolutions see."""


class DenseDecoder(nn.Module):
    """Queries of image patches read an encoder's tokens and frame vectors, then become pixels.

    A query is the code of its place, the vector of its slice and frame, and, where images are shown, its patch of them.
    What it has read becomes its part of an image of half the resolution, in which two convolutions see across patches'
    borders; each of its pixels then answers for four. The last layer begins at zero: so does the output.

    Args:
        patch: pixels (y, x) of a query, even; they divide the matrix.
        outputs: numbers of each pixel.
        shown: images that a query sees; 0: none.
        channels: of the image between queries and output.
    """

    def __init__(self, data: Data, model: Model, patch: tuple[int, int], outputs: int, shown: int, channels: int):
        super().__init__()
        width = model.decoder_width
        self.patch, self.channels = patch, channels
        places = tuple(
            tuple((i + 0.5) * p - n / 2 for i in range(n // p)) for n, p in zip(data.matrix, patch, strict=True)
        )
        self.shape = (len(places[0]), len(places[1]))
        self.frames = tuple(map(float, range(data.frames)))
        self.position = Position(Grid(data.view_types, self.frames, places), width)
        self.memory, self.query = nn.Linear(model.width, width), nn.Linear(model.width, width)
        self.embed = nn.Linear(shown * patch[0] * patch[1], width) if shown else None
        heads = width // model.head_width
        self.blocks = nn.ModuleList(
            Block(width, heads, model.mlp_ratio, cross=True) for _ in range(model.decoder_depth)
        )
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, channels * patch[0] * patch[1] // HALF**2)
        self.refine = nn.Sequential(
            nn.Conv2d(channels + shown * HALF**2, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GELU(),
        )
        self.out = nn.Conv2d(channels, outputs * HALF**2, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(
        self, encoded: Encoded, cells: Places, shown: Float[Tensor, "cell image y x"] | None = None
    ) -> Float[Tensor, "cell output y x"]:
        """The outputs, fp32, of the slices and frames of `cells`.

        Args:
            shown: images of these cells, of unit scale; None if the decoder is shown none.
        """
        memory, sources, _ = join([(encoded.tokens, encoded.lengths), (encoded.vectors, encoded.cells.lengths)])
        memory = self.memory(memory)
        count = self.shape[0] * self.shape[1]
        lengths = Lengths(tuple(n * count for n in cells.lengths.host), cells.lengths.counts * count)
        span = len(self.frames) // encoded.absent.shape[2]
        vectors = encoded.vectors[encoded.vector_of(cells, span)]
        x = self.position(self._index(cells)) + self.query(vectors)[:, None]
        if shown is not None and self.embed is not None:
            shown = shown.to(x.dtype)
            x = x + self.embed(self._patches(shown))
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x, lengths, memory, sources)
        x = self._image(self.pixels(self.norm(x)).unflatten(0, (-1, count)))
        if shown is not None:
            x = torch.cat([x, _halved(shown).contiguous(memory_format=torch.channels_last)], dim=1)
        return _doubled(self.out(self.refine(x))).float()

    def _index(self, cells: Places) -> Int[Tensor, "cell query axis"]:
        """Places (slice, t, y, x) of the queries of each cell."""
        rows, columns = (torch.arange(n, device=cells.index.device) for n in self.shape)
        grid = torch.cartesian_prod(rows, columns)
        count = len(grid)
        return torch.cat([cells.index[:, None].expand(-1, count, -1), grid.expand(len(cells.index), -1, -1)], dim=-1)

    def _patches(self, images: Float[Tensor, "cell image y x"]) -> Float[Tensor, "cell query feature"]:
        split = images.unflatten(3, (-1, self.patch[1])).unflatten(2, (-1, self.patch[0]))
        return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _image(self, x: Float[Tensor, "cell query feature"]) -> Float[Tensor, "cell channel half_y half_x"]:
        split = x.unflatten(2, (*(n // HALF for n in self.patch), self.channels)).unflatten(1, self.shape)
        pixels = split.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return pixels.movedim(-1, 1)  # channels last in memory, as convolutions are fastest


class PixelHead(nn.Module):
    """1 x 1 convolutions from maps to outputs, one at every resolution, which begin at zero.

    Args:
        channels: of each map.
        outputs: numbers of each pixel.
    """

    def __init__(self, channels: Sequence[int], outputs: int):
        super().__init__()
        self.out = nn.ModuleList(nn.Conv2d(width, outputs, 1) for width in channels)
        for layer in self.out:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, levels: Sequence[Float[Tensor, "cell _ _ _"]]) -> tuple[Float[Tensor, "cell output _ _"], ...]:
        """The outputs at each resolution, fp32."""
        return tuple(layer(level).float() for layer, level in zip(self.out, levels, strict=True))


def _halved(x: Float[Tensor, "cell channel y x"]) -> Float[Tensor, "cell more half_y half_x"]:
    """Each `HALF` x `HALF` pixels as channels of one: `pixel_unshuffle`, which leaves no cells at all as they are, of
    the wrong shape.
    """
    split = x.unflatten(3, (-1, HALF)).unflatten(2, (-1, HALF))
    return split.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def _doubled(x: Float[Tensor, "cell channel half_y half_x"]) -> Float[Tensor, "cell fewer y x"]:
    """Inverse of `_halved`."""
    split = x.unflatten(1, (-1, HALF, HALF))
    return split.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
