"""Masks at other positions: each class's indicator (one-hot) is interpolated linearly, then the largest wins.

Classes are compared by their weights alone, so any number of them costs the same and masks stay uint8.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kmtr.types import UNLABELLED


def interpolate(
    masks: UInt8[Tensor, "batch slice t _ _"],
    y: Float[Tensor, "batch ny nx"],
    x: Float[Tensor, "batch ny nx"],
    unlabelled: float,
) -> UInt8[Tensor, "batch slice t ny nx"]:
    """Masks at the positions (y, x) of each subject, in pixels from the centre of pixel (0, 0).

    Args:
        unlabelled: share of a position's weight at most that may be UNLABELLED or outside; with more it is UNLABELLED.
    """
    rows, columns = masks.shape[-2:]
    flat = masks.flatten(-2)
    top, left = y.floor(), x.floor()
    labels, weights = [], []
    for row, by_row in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, by_column in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = ((row >= 0) & (row < rows) & (column >= 0) & (column < columns)).flatten(1)[:, None, None]
            place = (row.clamp(0, rows - 1) * columns + column.clamp(0, columns - 1)).long().flatten(1)[:, None, None]
            found = flat.gather(-1, place.expand(*flat.shape[:-1], -1))
            labels.append(found.masked_fill_(~inside, UNLABELLED))
            weights.append((by_row * by_column).flatten(1)[:, None, None])
    return _largest(labels, weights, unlabelled).unflatten(-1, y.shape[1:])


def _largest(
    labels: Sequence[UInt8[Tensor, "*shape"]], weights: Sequence[Float[Tensor, "*#shape"]], unlabelled: float
) -> UInt8[Tensor, "*shape"]:
    """As `_voted`. Few pixels lie on a border: a CPU asks only these, a GPU would have to wait for their number."""
    first, *others = labels
    if first.device.type != "cpu":
        return _voted(labels, weights, unlabelled)
    border = reduce(torch.logical_or, (other != first for other in others)).nonzero(as_tuple=True)
    disputed = [w.expand(first.shape)[border] for w in weights]
    first[border] = _voted([label[border] for label in labels], disputed, unlabelled)
    return first


def _voted(
    labels: Sequence[UInt8[Tensor, "*shape"]], weights: Sequence[Float[Tensor, "*#shape"]], unlabelled: float
) -> UInt8[Tensor, "*shape"]:
    """The class of the greatest weight at each place, of equal ones the smaller value."""

    def weight(value: Tensor | int) -> Tensor:
        return reduce(torch.add, ((label == value) * w for label, w in zip(labels, weights, strict=True)))

    lost = weight(UNLABELLED)
    best, most = torch.full_like(labels[0], UNLABELLED), torch.zeros_like(lost)
    for label in labels:
        mine = weight(label).masked_fill_(label == UNLABELLED, 0)
        better = (mine > most) | ((mine == most) & (label < best))
        best, most = torch.where(better, label, best), torch.where(better, mine, most)
    return best.masked_fill_(lost > unlabelled, UNLABELLED)


def zero_filled(masks: UInt8[Tensor, "slice t _ _"], size: tuple[int, int]) -> UInt8[Tensor, "slice t ny nx"]:
    """Masks on the grid of the image whose k-space was filled up with zeros to `size`.

    The field of view stays, and the centre n // 2 on the centre: pixel j of N lies at n // 2 + (j - N // 2) n / N. The
    image is periodic, so beyond its last pixel comes the first. What an UNLABELLED pixel has any part in is UNLABELLED.
    """
    positions, wrapped = [], []
    for n, larger in zip(masks.shape[-2:], size, strict=True):
        offset = torch.arange(larger, device=masks.device) - larger // 2
        positions.append(1 + n // 2 + (offset.double() * n / larger).float())
        wrapped.append(torch.arange(-1, n + 1, device=masks.device) % n)
    y, x = torch.meshgrid(*positions, indexing="ij")
    around = masks[..., wrapped[0][:, None], wrapped[1]]
    return interpolate(around[None], y[None], x[None], unlabelled=0.0)[0]
