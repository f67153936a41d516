"""Phase and gain drop out, and nothing that may not be seen is looked at."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kmtr.data.loader.batch import Batch
from kmtr.physics import coils
from kmtr.physics.fourier import crop_or_pad, fftc
from kmtr.physics.lines import compress, compression, mix, phase_gain, readout, readout_inverse, static_part


def canonical(kspace: Tensor, visible: Tensor) -> Tensor:
    return kspace / phase_gain(kspace, visible)[..., None, None, None]


@pytest.fixture
def kspace() -> Tensor:
    """Two subjects, three slices, two coils, four frames."""
    return torch.randn(2, 3, 2, 4, 12, 10, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def visible() -> Tensor:
    chosen = torch.rand(2, 3, 4, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    chosen[..., 5:7] = True
    chosen[1, 2] = False  # a padded slice
    return chosen


def test_phase_of_a_slice_and_coil_and_gain_of_a_subject_drop_out(kspace: Tensor, visible: Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    phase = torch.rand(2, 3, 2, generator=generator) * 7
    gain = torch.tensor([1e-4, 3e3])[:, None, None].expand(phase.shape).contiguous()
    turned = kspace * torch.polar(gain, phase)[..., None, None, None]
    seen = visible.any(2).any(-1)  # batch slice: where none is seen there is nothing to take a phase from
    torch.testing.assert_close(canonical(turned, visible)[seen], canonical(kspace, visible)[seen], rtol=1e-4, atol=1e-5)


def test_a_part_of_the_gauge_leaves_the_other(kspace: Tensor, visible: Tensor) -> None:
    whole, gain = phase_gain(kspace, visible), phase_gain(kspace, visible, "gain")
    torch.testing.assert_close(gain, whole.abs() + 0j)
    assert torch.equal(phase_gain(kspace, visible, "none"), torch.ones(2, 3, 2, dtype=torch.complex64))


def test_canonical_k_space_has_no_phase_in_its_centre_and_unit_gain(kspace: Tensor) -> None:
    everything = torch.ones(2, 3, 4, 12, dtype=torch.bool)
    fixed = canonical(kspace, everything)
    summed = fixed[..., 4:8, 3:7].sum((-3, -2, -1))
    torch.testing.assert_close(summed.imag, torch.zeros_like(summed.imag), atol=1e-4, rtol=0)
    assert (summed.real > 0).all()
    energy = fixed[..., 4:8, :].abs().square().sum(-1).mean(-1).sum((1, 2, 3)) / (3 * 4)
    torch.testing.assert_close(energy, torch.ones(2))


def test_gain_depends_little_on_which_central_lines_are_seen(batch: Batch) -> None:
    everything = torch.ones_like(batch.sampled)
    few = everything.clone()
    few[:, :, :, 15:17] = False
    few[:, :, ::2, 15] = True
    few[:, :, ::2, 16] = True
    whole, part = (phase_gain(batch.kspace, v)[:, 0, 0].abs() for v in (everything, few))
    torch.testing.assert_close(part, whole, rtol=0.05, atol=0)


@pytest.mark.parametrize("rubbish", [1e30, float("inf"), float("nan")])
def test_what_is_not_visible_is_never_looked_at(kspace: Tensor, visible: Tensor, rubbish: float) -> None:
    spoilt = torch.where(visible[:, :, None, :, :, None], kspace, torch.tensor(complex(rubbish, rubbish)))
    torch.testing.assert_close(phase_gain(spoilt, visible), phase_gain(kspace, visible), rtol=0, atol=0)
    torch.testing.assert_close(compression(spoilt, visible, 2), compression(kspace, visible, 2), rtol=0, atol=0)
    seen = visible[:, :, None, :, :, None].expand_as(kspace)
    torch.testing.assert_close(compress(spoilt, visible, 2)[seen], compress(kspace, visible, 2)[seen], rtol=0, atol=0)
    torch.testing.assert_close(static_part(spoilt, visible), static_part(kspace, visible), rtol=0, atol=0)


def test_the_static_part_is_the_mean_over_the_frames_that_saw_a_line(kspace: Tensor, visible: Tensor) -> None:
    torch.testing.assert_close(static_part(kspace, torch.ones_like(visible)), kspace.mean(3))
    static = static_part(kspace, visible)
    for b, s, ky in ((0, 0, 0), (0, 2, 3), (1, 1, 11), (1, 2, 6)):
        frames = kspace[b, s, :, visible[b, s, :, ky], ky]  # coil t kx
        expected = frames.mean(1) if frames.shape[1] else torch.zeros(2, 10, dtype=torch.complex64)
        torch.testing.assert_close(static[b, s, :, ky], expected)


def test_a_subject_without_a_central_line_keeps_its_numbers_finite(kspace: Tensor, visible: Tensor) -> None:
    visible[0] = False
    assert canonical(kspace, visible).isfinite().all()
    assert (phase_gain(kspace, visible)[0].abs() == 1).all()


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("samples", [6, 10, 14])
def test_the_readout_of_a_line_is_unitary_on_its_band(kspace: Tensor, hybrid: bool, samples: int) -> None:
    values = readout(kspace, samples, hybrid)
    assert values.shape[-1] == samples
    kept = slice(max(0, 5 - samples // 2), 5 + samples // 2)
    band = torch.zeros_like(kspace)
    band[..., kept] = kspace[..., kept]
    torch.testing.assert_close(values.abs().square().sum(-1), band.abs().square().sum(-1))
    torch.testing.assert_close(crop_or_pad(readout_inverse(values, hybrid), (10,), (-1,)), band, rtol=0, atol=1e-5)


def test_a_line_of_a_smaller_matrix_is_interpolated_along_x() -> None:
    x = torch.arange(24) / 24 - 0.5
    wave = torch.polar(torch.ones(24), 2 * torch.pi * 3 * x)
    fine = readout(fftc(wave, (-1,)), 32, hybrid=True)
    expected = torch.polar(torch.full((32,), math.sqrt(24 / 32)), 2 * torch.pi * 3 * (torch.arange(32) / 32 - 0.5))
    torch.testing.assert_close(fine, expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- coils


@pytest.fixture
def array() -> Tensor:
    """Two subjects, two slices, five unlike coils, three frames."""
    generator = torch.Generator().manual_seed(3)
    kspace = torch.randn(2, 2, 5, 3, 12, 10, dtype=torch.complex64, generator=generator)
    mixing = torch.randn(2, 2, 5, 5, dtype=torch.complex64, generator=generator)
    return mix(kspace, mixing)


@pytest.fixture
def shown() -> Tensor:
    return torch.rand(2, 2, 3, 12, generator=torch.Generator().manual_seed(4)) < 0.5


@pytest.mark.parametrize("few", [1, 2, 5])
def test_virtual_coils_keep_the_energy_of_the_largest_eigenvalues(array: Tensor, shown: Tensor, few: int) -> None:
    weights = compression(array, shown, few)
    torch.testing.assert_close(weights @ weights.mH, torch.eye(few).expand(2, 2, few, few) + 0j, rtol=0, atol=1e-5)
    virtual = mix(array, weights) * shown[:, :, None, :, :, None]
    seen = (array * shown[:, :, None, :, :, None]).flatten(3)
    largest = torch.linalg.eigvalsh(seen @ seen.mH).flip(-1)[..., :few]
    torch.testing.assert_close(virtual.flatten(3).abs().square().sum(-1), largest, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("few", [1, 2, 4])
def test_virtual_coils_are_those_of_ingestion(array: Tensor, shown: Tensor, few: int) -> None:
    ours = compress(array, shown, few)
    for row in range(2):
        theirs = torch.from_numpy(coils.compress(array[row].numpy(), shown[row].numpy(), few))
        torch.testing.assert_close(ours[row], theirs, rtol=1e-4, atol=1e-4)


def test_mixing_coils_by_a_unitary_matrix_turns_virtual_ones_by_a_phase(array: Tensor, shown: Tensor) -> None:
    unitary, _ = torch.linalg.qr(torch.randn(2, 2, 5, 5, dtype=torch.complex64))
    ours, theirs = (compress(kspace, shown, 3) for kspace in (array, mix(array, unitary)))
    torch.testing.assert_close(canonical(theirs, shown), canonical(ours, shown), rtol=1e-3, atol=1e-4)


def test_one_coil_stays_and_coils_without_a_signal_make_none(array: Tensor, shown: Tensor) -> None:
    torch.testing.assert_close(compress(array[:, :, :1], shown, 1), array[:, :, :1])
    padded = array.clone()
    padded[:, :, 3:] = 0
    few = compress(array[:, :, :3], shown, 5)
    assert few.shape[2] == 3
    many = compress(padded, shown, 5)
    torch.testing.assert_close(many[:, :, :3], few)
    assert many[:, :, 3:].abs().max() < 1e-4
