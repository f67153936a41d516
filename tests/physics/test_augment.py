"""Augmentation does to image and pattern what it says, alone or in company, in an array of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kmtr.config import Augment
from kmtr.physics.augment import augment, mirror, rotate, shift
from kmtr.physics.fourier import crop_or_pad, fft2c, ifft2c

ALL = Augment(shift=0.2, rotation_deg=30, flip=True, phase=True, coil_dropout=0.4, noise=0.1)
SHAPE = (2, 3, 2)  # slice, coil, t


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def extents(*sizes: Sequence[int]) -> Tensor:
    return torch.tensor(sizes)


def pad(kspace: Tensor, ny: int, nx: int) -> Tensor:
    return crop_or_pad(kspace, (ny, nx), (-2, -1))


def blob(ny: int, nx: int, angle: float = 0.0, centre: tuple[float, float] = (5.0, -3.0)) -> Tensor:
    """k-space (one subject, slice, coil and frame) of an oblique Gaussian, rotated by `angle` about the centre: compact
    and band-limited to five digits.
    """
    y, x = torch.meshgrid(torch.arange(ny) - ny // 2, torch.arange(nx) - nx // 2, indexing="ij")
    y, x = y.double(), x.double()
    c, s = math.cos(angle), math.sin(angle)
    y, x = y * c + x * s - centre[0], -y * s + x * c - centre[1]
    image = torch.exp(-(y**2) / (2 * 2.6**2) - x**2 / (2 * 1.7**2) - 0.05 * x * y) * torch.exp(0.2j * y)
    return fft2c(image).to(torch.complex64)[None, None, None, None]


def full(kspace: Tensor, extent: Tensor) -> Tensor:
    """All own lines of a fully sampled source."""
    ky = torch.arange(kspace.shape[-2]) - kspace.shape[-2] // 2
    n = extent[:, :1]
    own = (ky >= -(n // 2)) & (ky < n - n // 2)
    return own[:, None, None].expand(*kspace.shape[:2], kspace.shape[3], -1)


def run(
    kspace: Tensor, config: Augment, extent: Tensor | None = None, **changes: Tensor | int
) -> tuple[Tensor, Tensor]:
    size = len(kspace)
    extent = extents(kspace.shape[-2:]).expand(size, 2) if extent is None else extent
    arguments = {
        "acquired": full(kspace, extent),
        "seed": 7,
        "epoch": torch.zeros(size, dtype=torch.int64),
        "key": torch.arange(size) + 100,
        "given": torch.zeros(size, dtype=torch.bool),
    }
    return augment(kspace, extent=extent, config=config, **(arguments | changes))


def energy(x: Tensor) -> float:
    return x.abs().double().square().sum().item()


@pytest.mark.parametrize("size", [(16, 12), (15, 9), (8, 11)])
@pytest.mark.parametrize("pixels", [(3, -2), (0, 1), (-4, 4)])
def test_a_shift_by_whole_pixels_rolls_the_image(size: tuple[int, int], pixels: tuple[int, int]) -> None:
    image = noise(2, 1, 2, 3, *size)
    share = torch.tensor([[p / n for p, n in zip(pixels, size, strict=True)], [0.0, 0.0]])
    moved = ifft2c(shift(fft2c(image), share))
    torch.testing.assert_close(moved[0], image[0].roll(pixels, (-2, -1)), atol=1e-4, rtol=0)
    torch.testing.assert_close(moved[1], image[1], atol=1e-5, rtol=0)


def test_shifts_add_up_and_keep_energy_and_the_share_in_any_array() -> None:
    kspace = noise(1, 1, 1, 1, 12, 10)
    third = torch.tensor([[0.123, -0.071]])
    once = shift(kspace, 2 * third)
    torch.testing.assert_close(shift(shift(kspace, third), third), once, atol=1e-5, rtol=0)
    assert energy(once) == pytest.approx(energy(kspace), rel=1e-5)
    torch.testing.assert_close(shift(pad(kspace, 20, 17), 2 * third), pad(once, 20, 17), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(16, 12), (15, 9), (8, 11)])
@pytest.mark.parametrize("axes", [(True, False), (False, True), (True, True)])
def test_a_mirror_reverses_the_image_about_its_centre(size: tuple[int, int], axes: tuple[bool, bool]) -> None:
    image = noise(2, 1, 2, 3, *size)
    extent = extents(size, size)
    chosen = torch.tensor([axes, (False, False)])
    kspace, _ = mirror(fft2c(image), full(image, extent), extent, chosen)
    dims = [d for d, on in zip((-2, -1), axes, strict=True) if on]
    # Pixel -r of an even size: the centre n // 2 stays, so does pixel 0.
    expected = image.flip(dims).roll([1 - size[d] % 2 for d in dims], dims)
    torch.testing.assert_close(ifft2c(kspace)[0], expected[0], atol=1e-5, rtol=0)
    assert kspace[1].equal(fft2c(image)[1])


def test_the_pattern_is_mirrored_with_its_lines_within_the_extent() -> None:
    extent = extents((12, 10), (11, 7), (12, 10))
    acquired = (torch.rand(3, 2, 2, 20, generator=torch.Generator().manual_seed(0)) < 0.4) & full(
        noise(3, 2, 3, 2, 20, 16), extent
    )
    inside = torch.zeros(3, 1, 1, 1, 20, 16)
    for i, (ny, nx) in enumerate(extent.tolist()):
        inside[i] = pad(torch.ones(ny, nx), 20, 16)
    kspace = noise(3, 2, 3, 2, 20, 16) * acquired[:, :, None, :, :, None] * inside
    axes = torch.tensor([(True, True), (True, True), (False, False)])
    mirrored, pattern = mirror(kspace, acquired, extent, axes)
    assert ((mirrored != 0).any(-1).any(2) == pattern).all()
    assert energy(mirrored) == pytest.approx(energy(kspace))
    again, same = mirror(mirrored, pattern, extent, axes)
    assert again.equal(kspace)
    assert same.equal(acquired)
    assert pattern[2].equal(acquired[2])
    # As in an array of its own size: line -6 of 12 is its own mirror image.
    own, own_pattern = mirror(pad(kspace[:1], 12, 10), crop_or_pad(acquired[:1], (12,), (-1,)), extent[:1], axes[:1])
    assert pad(own, 20, 16).equal(mirrored[:1])
    assert own_pattern[..., 0].equal(acquired[:1, ..., 4])


@pytest.mark.parametrize("n", [16, 15])
def test_quarter_turns_are_exactly_those_of_rot90(n: int) -> None:
    image = noise(5, 1, 1, 2, n, n)
    angle = torch.arange(-1, 4) * (math.pi / 2)
    turned = ifft2c(rotate(fft2c(image), angle, extents((n, n)).expand(5, 2)))
    even = 1 - n % 2  # about the centre n // 2, where rot90 turns about (n - 1) / 2
    for i, k in enumerate(range(-1, 4)):
        expected = image[i]
        for _ in range(k % 4):
            expected = expected.rot90(1, (-2, -1)).roll(even, -2)
        torch.testing.assert_close(turned[i], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("degrees", [7.3, -30.0, 45.0, 60.0, 88.0, 135.0, -170.0])
@pytest.mark.parametrize("size", [(48, 48), (49, 49), (56, 48)])
def test_rotation_is_that_of_a_function_of_position(degrees: float, size: tuple[int, int]) -> None:
    angle = math.radians(degrees)
    kspace = blob(*size)
    turned = rotate(kspace, torch.tensor([angle]), extents(size))
    expected = blob(*size, angle)
    assert energy(turned - expected) < 1e-6 * energy(expected)
    assert energy(turned) == pytest.approx(energy(kspace), rel=1e-5)
    # In a larger array of another shape the pixels of the extent stay square.
    large = rotate(pad(kspace, 64, 72), torch.tensor([angle]), extents(size))
    assert energy(large - pad(expected, 64, 72)) < 1e-6 * energy(expected)


def test_rotation_is_unitary_and_undone_by_its_opposite() -> None:
    kspace, other = noise(3, 1, 2, 1, 24, 24), noise(3, 1, 2, 1, 24, 24, seed=1)
    angle, extent = torch.tensor([0.3, -0.7, 2.4]), extents((24, 24)).expand(3, 2)
    turned = rotate(kspace, angle, extent)
    assert energy(turned) == pytest.approx(energy(kspace), rel=1e-5)
    inner = torch.vdot(kspace.flatten(), other.flatten())
    assert torch.vdot(turned.flatten(), rotate(other, angle, extent).flatten()).item() == pytest.approx(
        inner.item(), abs=1e-3
    )
    small = angle[:2]
    back = rotate(turned[:2], -small, extent[:2])
    torch.testing.assert_close(back, kspace[:2], atol=1e-4, rtol=0)


def test_nothing_switched_on_returns_the_very_tensors() -> None:
    kspace = noise(2, *SHAPE, 16, 16)
    acquired = torch.ones(2, 2, 2, 16, dtype=torch.bool)
    out, pattern = run(kspace, Augment(), acquired=acquired)
    assert out is kspace
    assert pattern is acquired


def test_the_argument_is_left_as_it_is() -> None:
    kspace = noise(2, *SHAPE, 16, 16)
    before = kspace.clone()
    run(kspace, ALL)
    assert kspace.equal(before)


def test_shifts_rotations_and_mirrors_are_one_per_subject_and_within_their_bounds() -> None:
    size, count = (32, 32), 40
    one = blob(*size, centre=(0, 0))
    kspace = one.expand(count, 2, 3, 2, *size)
    for config in (Augment(shift=0.25), Augment(rotation_deg=40), Augment(flip=True)):
        out, _ = run(kspace, config)
        torch.testing.assert_close(out, out[:, :1, :1, :1].expand(out.shape), atol=1e-5, rtol=0)
        assert len({x.numpy().tobytes() for x in out[:, 0, 0, 0]}) == (4 if config.flip else count)
    image = ifft2c(run(kspace, Augment(shift=0.25))[0])[:, 0, 0, 0].abs().square()
    share = (torch.arange(32) - 16) / 32
    for axis in (1, 2):
        middle = (image.sum(axis) * share).sum(-1) / image.sum((1, 2))
        assert middle.abs().max() < 0.26
        assert middle.std().item() == pytest.approx(0.25 / math.sqrt(3), rel=0.3)


def test_a_source_that_was_undersampled_is_not_rotated() -> None:
    kspace = noise(4, *SHAPE, 16, 16)
    given = torch.tensor([True, False, True, False])
    acquired = torch.rand(4, 2, 2, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    acquired[~given] = True
    kspace = kspace * acquired[:, :, None, :, :, None]
    out, pattern = run(kspace, Augment(rotation_deg=90), acquired=acquired, given=given)
    assert out[given].equal(kspace[given])
    assert ((out[~given] - kspace[~given]).abs().amax((1, 2, 3, 4, 5)) > 0.1).all()
    assert pattern.equal(acquired)


def test_a_phase_per_slice_leaves_magnitudes() -> None:
    kspace = noise(3, *SHAPE, 8, 8)
    out, _ = run(kspace, Augment(phase=True))
    torch.testing.assert_close(out.abs(), kspace.abs())
    turn = (out / kspace).angle()
    torch.testing.assert_close(torch.exp(1j * (turn - turn[:, :, :1, :1, :1, :1])), torch.ones_like(kspace))
    assert len(set(turn[:, :, 0, 0, 0, 0].flatten().tolist())) == 6
    many, _ = run(torch.ones(500, 1, 1, 1, 2, 2, dtype=torch.complex64), Augment(phase=True))
    assert many[:, 0, 0, 0, 0, 0].mean().abs() < 0.2


def test_dropout_silences_its_share_of_the_coils_that_are_there() -> None:
    kspace = noise(200, 3, 10, 1, 4, 4)
    kspace[:, :, 8:] = 0  # slots without a coil
    kspace[:, 1, 1:] = 0  # a slice of one coil
    out, _ = run(kspace, Augment(coil_dropout=0.3))
    live = energy_of_coils(out) > 0
    assert (live[:, [0, 2]].sum(-1) == 6).all()  # 8 - round(2.4)
    assert (live[:, 1].sum(-1) == 1).all()
    often = live[:, 0, :8].double().mean(0)
    assert (often - 0.75).abs().max() < 0.15
    assert out[live].equal(kspace[live])  # neither changed nor made louder
    most, _ = run(kspace, Augment(coil_dropout=0.99))
    assert (energy_of_coils(most) > 0).sum(-1).eq(1).all()
    assert not live[:, 0].equal(live[:, 2])


def energy_of_coils(kspace: Tensor) -> Tensor:
    return kspace.abs().square().sum((-3, -2, -1))


def test_noise_has_its_level_and_stays_on_acquired_lines() -> None:
    count, extent = 300, extents((20, 12)).expand(300, 2)
    inside = pad(torch.ones(20, 12), 24, 16)
    kspace = 5 * noise(count, 2, 3, 2, 24, 16) * inside
    kspace[:, :, 2] = 0
    acquired = full(kspace, extent) & (torch.rand(count, 2, 2, 24, generator=torch.Generator().manual_seed(0)) < 0.5)
    kspace = kspace * acquired[:, :, None, :, :, None]
    out, pattern = run(kspace, Augment(noise=0.2), extent, acquired=acquired)
    assert pattern.equal(acquired)
    added = out - kspace
    where = (acquired[:, :, None, :, :, None] * inside).bool() & (energy_of_coils(kspace) > 0)[..., None, None, None]
    assert added[~where].abs().max() == 0
    sigma = (added.abs().square().sum((1, 2, 3, 4, 5)) / where.sum((1, 2, 3, 4, 5))).sqrt() / 5
    assert sigma.max() < 0.21
    assert sigma.min() < 0.02
    assert sigma.mean().item() == pytest.approx(0.1, abs=0.01)
    assert sigma.std().item() == pytest.approx(0.2 / math.sqrt(12), rel=0.15)


def test_a_silent_coil_is_not_given_noise_and_the_level_is_that_of_all_coils() -> None:
    kspace = noise(20, 2, 5, 2, 8, 8)
    dropped, _ = run(kspace, Augment(coil_dropout=0.4))
    both, _ = run(kspace, Augment(coil_dropout=0.4, noise=0.1))
    noisy, _ = run(kspace, Augment(noise=0.1))
    live = energy_of_coils(dropped) > 0
    assert not both[~live].any()
    torch.testing.assert_close(both[live], noisy[live])


@pytest.mark.parametrize("config", [ALL, ALL.model_copy(update={"rotation_deg": 180.0})])
def test_the_company_changes_nothing_and_no_energy_leaves_the_pattern(config: Augment) -> None:
    extent = extents((16, 16), (12, 16), (14, 12), (16, 16), (11, 13))
    inside = torch.stack([pad(torch.ones(*size), 16, 16) for size in extent.tolist()])[:, None, None, None]
    given = torch.tensor([False, True, False, False, True])
    acquired = full(noise(5, *SHAPE, 16, 16), extent).clone()
    acquired[given] &= torch.rand(2, 2, 2, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    acquired[0, :, 1] = False  # a padded frame
    kspace = noise(5, *SHAPE, 16, 16) * inside * acquired[:, :, None, :, :, None]
    arguments = {"epoch": torch.tensor([0, 1, 0, 1, 2]), "key": torch.tensor([5, 6, 7, -8, 9]), "given": given}
    arguments["acquired"] = acquired
    out, pattern = run(kspace, config, extent, **arguments)
    assert out.isfinite().all()
    assert not out[~(pattern[:, :, None, :, :, None] & inside.bool()).expand(out.shape)].any()
    for rows in ([0], [4, 2], [3, 1, 0]):
        alone, alone_pattern = run(kspace[rows], config, extent[rows], **{k: v[rows] for k, v in arguments.items()})
        torch.testing.assert_close(alone, out[rows], atol=1e-5, rtol=1e-5)
        assert alone_pattern.equal(pattern[rows])
    for change in ({"seed": 8}, {"epoch": arguments["epoch"] + 1}, {"key": arguments["key"] + 1}):
        other, _ = run(kspace, config, extent, **(arguments | change))
        assert ((other - out).abs().amax((1, 2, 3, 4, 5)) > 1e-3).all()


def test_a_larger_array_changes_nothing() -> None:
    extent = extents((16, 12)).expand(6, 2)
    kspace = noise(6, *SHAPE, 16, 12)
    config = ALL.model_copy(update={"rotation_deg": 0.0})
    small, pattern = run(kspace, config, extent)
    large, large_pattern = run(pad(kspace, 23, 20), config, extent)
    torch.testing.assert_close(large, pad(small, 23, 20), atol=1e-5, rtol=1e-5)
    assert large_pattern.equal(crop_or_pad(pattern, (23,), (-1,)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_augments_alike() -> None:
    kspace, extent = noise(4, *SHAPE, 16, 16), extents((16, 16)).expand(4, 2)
    size = {"epoch": torch.zeros(4, dtype=torch.int64), "key": torch.arange(4), "given": torch.zeros(4).bool()}
    size["acquired"] = full(kspace, extent)
    out, pattern = run(kspace, ALL, extent, **size)
    gpu, gpu_pattern = run(kspace.cuda(), ALL, extent.cuda(), **{k: v.cuda() for k, v in size.items()})
    torch.testing.assert_close(gpu.cpu(), out, atol=1e-4, rtol=1e-4)
    assert gpu_pattern.cpu().equal(pattern)
