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
"""Pixels of the output along each side of a pixel of the finest maps."""
KERNEL = 3


class DenseDecoder(nn.Module):
    """Queries of image patches read an encoder's tokens and frame vectors, then become pixels.

    Where images are shown, convolutions halve them down to the grid of the queries, and the maps on the way are seen
    again on the way up, as in a U-Net: tokens say what the images lack, and need not say what they show. A query is the
    code of its place, the vector of its slice and frame, and the coarsest map there. What it has read goes up again to
    half the resolution of the output, each pixel of which then answers for four. The last layer begins at zero: so does
    the output.

    Args:
        patch: pixels (y, x) of a query, even; they divide the matrix.
        outputs: numbers of each pixel.
        shown: images that a query sees; 0: none.
        channels: of the finest maps on the way up; on the way down half of them, twice as many at each coarser one, up
            to the width of the queries.
    """

    def __init__(self, data: Data, model: Model, patch: tuple[int, int], outputs: int, shown: int, channels: int):
        super().__init__()
        width = model.decoder_width
        places = tuple(
            tuple((i + 0.5) * p - n / 2 for i in range(n // p)) for n, p in zip(data.matrix, patch, strict=True)
        )
        self.shape = (len(places[0]), len(places[1]))
        self.frames = tuple(map(float, range(data.frames)))
        self.position = Position(Grid(data.view_types, self.frames, places), width)
        self.memory, self.query = nn.Linear(model.width, width), nn.Linear(model.width, width)
        steps = strides((patch[0] // HALF, patch[1] // HALF))
        widths = [min(max(channels // 2, 1) * 2**level, width) for level in range(len(steps) + 1)]
        self.down = nn.ModuleList()
        if shown:
            before = [shown * HALF**2, *widths[:-1]]
            self.down.extend(map(_convolved, before, widths, [(1, 1), *steps]))
            self.embed = nn.Linear(widths[-1], width)
        heads = width // model.head_width
        self.blocks = nn.ModuleList(
            Block(width, heads, model.mlp_ratio, cross=True) for _ in range(model.decoder_depth)
        )
        self.norm = nn.LayerNorm(width)
        seen = [own * bool(shown) for own in widths]
        seen[0] += shown * HALF**2
        after = [channels, *widths[1:]]
        self.up, self.merge = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(steps))):
            above = width if level + 1 == len(steps) else after[level + 1]
            self.up.append(nn.ConvTranspose2d(above, after[level], steps[level], steps[level]))
            self.merge.append(_convolved(after[level] + seen[level], after[level]))
        if not steps:
            self.merge.append(_convolved(width + seen[0], channels))
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
        maps: list[Tensor] = []
        if shown is not None:
            finest = _halved(shown.to(x.dtype)).contiguous(memory_format=torch.channels_last)
            for layer in self.down:
                maps.append(layer(maps[-1] if maps else finest))
            x = x + self.embed(maps[-1].flatten(2).transpose(1, 2))
            maps[0] = torch.cat([maps[0], finest], dim=1)
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x, lengths, memory, sources)
        x = self.norm(x).unflatten(0, (-1, *self.shape)).movedim(-1, 1)  # channels last in memory: fastest
        for i, merge in enumerate(self.merge):
            x = self.up[i](x) if len(self.up) else x
            x = merge(torch.cat([x, maps[len(self.merge) - 1 - i]], dim=1) if maps else x)
        return _doubled(self.out(x)).float()

    def _index(self, cells: Places) -> Int[Tensor, "cell query axis"]:
        """Places (slice, t, y, x) of the queries of each cell."""
        rows, columns = (torch.arange(n, device=cells.index.device) for n in self.shape)
        grid = torch.cartesian_prod(rows, columns)
        count = len(grid)
        return torch.cat([cells.index[:, None].expand(-1, count, -1), grid.expand(len(cells.index), -1, -1)], dim=-1)


def strides(factor: tuple[int, int]) -> list[tuple[int, int]]:
    """Steps from a resolution to one coarser by `factor` (y, x): halves as long as they go, then what is left."""
    found = []
    while factor != (1, 1):
        step = tuple(2 if n % 2 == 0 else n for n in factor)
        found.append((step[0], step[1]))
        factor = (factor[0] // step[0], factor[1] // step[1])
    return found


def _convolved(before: int, after: int, step: tuple[int, int] = (1, 1)) -> nn.Sequential:
    """A convolution, instance norm (as nnU-Net has it), GELU."""
    return nn.Sequential(
        nn.Conv2d(before, after, KERNEL, step, padding=KERNEL // 2, bias=False),
        nn.GroupNorm(after, after),  # instance norm that leaves channels last, and takes no cells at all
        nn.GELU(),
    )


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
