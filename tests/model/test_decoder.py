"""The decoder of masks and images: every patch, with images and without, and no cells at all."""

from __future__ import annotations

import pytest
import torch

from kmtr.config import Data, Model
from kmtr.model.dense import DenseDecoder, strides
from kmtr.model.encoder import Encoded
from kmtr.model.packing import Lengths, Places

MATRIX, FRAMES, WIDTH, SHOWN = (24, 48), 4, 16, 3


def test_an_axis_is_halved_as_long_as_it_goes() -> None:
    assert strides((4, 4)) == [(2, 2), (2, 2)]
    assert strides((4, 1)) == [(2, 1), (2, 1)]
    assert strides((6, 3)) == [(2, 3), (3, 1)]
    assert strides((1, 1)) == []


def places(frames: int) -> Places:
    """The first frames of the one slice of two subjects."""
    index = torch.cartesian_prod(torch.arange(1), torch.arange(FRAMES))[:frames]
    return Places(Lengths((frames, frames), torch.tensor([frames, frames])), index.repeat(2, 1))


def encoded() -> Encoded:
    generator = torch.Generator().manual_seed(0)
    tokens, vectors = (torch.randn(count, WIDTH, generator=generator) for count in (8, 2 * FRAMES))
    absent = torch.zeros(2, 1, FRAMES, dtype=torch.bool)
    return Encoded(tokens.requires_grad_(), Lengths((5, 3), torch.tensor([5, 3])), vectors, places(FRAMES), absent)


@pytest.mark.parametrize("patch", [(8, 8), (12, 4), (24, 48), (2, 2)])
@pytest.mark.parametrize("shown", [0, SHOWN])
def test_every_weight_learns_from_a_decoder_that_begins_at_zero(patch: tuple[int, int], shown: int) -> None:
    torch.manual_seed(0)
    data = Data(views=("sax",), sax_slices=1, frames=FRAMES, matrix=MATRIX)
    model = Model(width=WIDTH, head_width=8, decoder_width=16, decoder_depth=1, mlp_ratio=2)
    decoder = DenseDecoder(data, model, patch, 6, shown, 8)
    seen, some = encoded(), places(3)
    images = torch.randn(6, SHOWN, *MATRIX) if shown else None
    found = decoder(seen, some, images)
    assert found.shape == (6, 6, *MATRIX)
    assert not found.any()

    with torch.no_grad():
        decoder.out.weight.normal_()
    decoder(seen, some, images).square().sum().backward()
    assert [name for name, weight in decoder.named_parameters() if weight.grad is None] == []
    assert seen.tokens.grad is not None
    assert seen.tokens.grad.abs().sum(1).all(), "every token of every subject is read"

    none = decoder(seen, places(0), None if images is None else images[:0])
    assert none.shape == (0, 6, *MATRIX)
