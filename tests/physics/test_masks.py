"""Masks at other positions: the class of the greatest linear weight, and where nothing is known nothing is said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kmtr.physics.fourier import crop_or_pad, fft2c, ifft2c
from kmtr.physics.masks import interpolate, zero_filled
from kmtr.types import UNLABELLED


def drawn(*shape: int, classes: int = 6, unlabelled: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, classes, shape, generator=generator, dtype=torch.uint8)
    return masks.masked_fill(torch.rand(shape, generator=generator) < unlabelled, UNLABELLED)


def positions(batch: int, size: tuple[int, int], low: float, high: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y, x = torch.rand(2, batch, *size, generator=generator) * (high - low) + low
    return y, x


def by_hand(masks: Tensor, y: float, x: float, unlabelled: float) -> int:
    """One pixel of one mask by a table of classes."""
    weight: dict[int, float] = {}
    for row in range(-2, masks.shape[0] + 4):
        for column in range(-2, masks.shape[1] + 4):
            share = max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column))
            inside = 0 <= row < masks.shape[0] and 0 <= column < masks.shape[1]
            value = int(masks[row, column]) if inside else UNLABELLED
            weight[value] = weight.get(value, 0.0) + share
    if weight.pop(UNLABELLED, 0.0) > unlabelled:
        return UNLABELLED
    return max(weight, key=lambda value: (weight[value], -value))


@pytest.mark.parametrize("unlabelled", [0.0, 0.5])
def test_the_class_of_the_greatest_weight_wins(unlabelled: float) -> None:
    masks = drawn(2, 1, 2, 9, 7, unlabelled=0.2)
    y, x = positions(2, (8, 9), -1.4, 9.4)
    found = interpolate(masks, y, x, unlabelled)
    assert found.dtype == torch.uint8
    for b, t, i, j in torch.cartesian_prod(*map(torch.arange, (2, 2, 8, 9))).tolist():
        expected = by_hand(masks[b, 0, t], float(y[b, i, j]), float(x[b, i, j]), unlabelled)
        assert found[b, 0, t, i, j] == expected
    assert (found == UNLABELLED).any()
    assert (found != UNLABELLED).any()


def test_pixels_themselves_stay_and_equal_weights_are_the_smaller_class_s() -> None:
    masks = drawn(1, 2, 3, 8, 6, unlabelled=0.3)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    for unlabelled in (0.0, 0.5):
        assert interpolate(masks, y[None], x[None], unlabelled).equal(masks)
    pair = torch.tensor([[5, 2]], dtype=torch.uint8)[None, None, None]
    half, zero = torch.full((1, 1, 1), 0.5), torch.zeros(1, 1, 1)
    assert interpolate(pair, zero, half, 0.5).item() == 2


@pytest.mark.parametrize("size", [(12, 10), (11, 9), (12, 9)])
@pytest.mark.parametrize("larger", [(24, 20), (17, 16), (13, 10), (12, 10)])
def test_pixels_of_a_zero_filled_image_that_fall_on_the_source_s_keep_their_class(
    size: tuple[int, int], larger: tuple[int, int]
) -> None:
    """Where the image is, there is its mask: single bright pixels stay the brightest of their neighbourhood."""
    y, x = 7, 3
    image = torch.zeros(size, dtype=torch.complex128)
    image[y, x] = 1
    bright = ifft2c(crop_or_pad(fft2c(image), larger, (-2, -1))).abs()
    masks = (image.abs() > 0).to(torch.uint8)[None, None]
    found = zero_filled(masks, larger)[0, 0]
    assert found.shape == larger
    peak = divmod(int(bright.argmax()), larger[1])
    assert found[peak] == 1
    assert found.sum() <= 4
    everywhere = zero_filled(torch.full_like(masks, 3), larger)
    assert (everywhere == 3).all()  # none is lost at the edges
    hole = torch.where(masks == 1, UNLABELLED, 3).to(torch.uint8)
    touched = zero_filled(hole, larger)[0, 0] == UNLABELLED
    assert touched[peak]
    assert touched.sum() >= found.sum()


def test_a_disc_zero_filled_is_where_its_image_is() -> None:
    for size, larger in (((96, 96), (128, 128)), ((97, 101), (128, 129)), ((128, 96), (128, 128))):
        rows, columns = ((torch.arange(n) - n // 2) / n for n in size)
        disc = torch.hypot(rows[:, None] - 0.08, columns + 0.11) < 0.17
        kspace = crop_or_pad(fft2c(disc.to(torch.complex64)), larger, (-2, -1))
        scale = (size[0] * size[1] / larger[0] / larger[1]) ** 0.5
        bright = ifft2c(kspace).abs() > scale / 2
        mine = zero_filled(disc.to(torch.uint8)[None, None], larger)[0, 0] == 1
        assert 2 * (mine & bright).sum() / (mine.sum() + bright.sum()) > 0.97


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_interpolates_alike() -> None:
    masks = drawn(3, 2, 2, 32, 32, unlabelled=0.1)
    y, x = positions(3, (32, 32), -1.0, 33.0)
    found = interpolate(masks, y, x, 0.5)
    assert (interpolate(masks.cuda(), y.cuda(), x.cuda(), 0.5).cpu() == found).float().mean() > 0.999
