"""Low-rank + sparse: the operator's adjoint, lines put back, what it recovers, and what it is blind to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kmtr.physics import lowrank
from kmtr.physics.fourier import fft2c, ifft2c
from kmtr.physics.lines import view_shared
from kmtr.physics.lowrank import low_rank_sparse

SHAPE = (2, 3, 2, 8, 16, 12)  # batch slice coil t ky kx


def scan(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A still background of two coils in which a few pixels beat; every third line of each frame, and its centre."""
    drawn = torch.Generator().manual_seed(seed)
    batch, slices, _, frames, ny, nx = SHAPE
    series = torch.rand(batch, slices, 1, 1, ny, nx, generator=drawn).expand(-1, -1, -1, frames, -1, -1).clone()
    beat = torch.cos(2 * torch.pi * torch.arange(frames) / frames)[:, None, None]
    series[..., 6:10, 4:8] += beat
    angle = torch.linspace(0, 1.5, ny)[:, None] + torch.linspace(0, 1, nx)
    maps = torch.stack([torch.polar(torch.cos(angle), angle), torch.polar(torch.sin(angle), -angle)])
    sampled = torch.zeros(batch, slices, frames, ny, dtype=torch.bool)
    for t in range(frames):
        sampled[:, :, t, t % 3 :: 3] = True
    sampled[..., ny // 2 - 2 : ny // 2 + 2] = True
    return fft2c(series * maps[:, None]), sampled


def error(kspace: Tensor, truth: Tensor) -> float:
    return float((kspace - truth).abs().square().sum() / truth.abs().square().sum())


def test_combining_coils_and_taking_lines_is_the_adjoint_of_parting_them() -> None:
    """<E m, d> = <m, E* d>, with the sum of squares of the sensitivities 1."""
    kspace, sampled = scan()
    drawn = torch.Generator().manual_seed(1)
    mask = sampled[:, :, None, :, :, None]
    maps = lowrank._sensitivities(lowrank._image(kspace))
    torch.testing.assert_close(maps.abs().square().sum(2), torch.ones_like(maps[:, :, 0].real))
    m = torch.randn(*kspace.shape[:2], *kspace.shape[3:], dtype=torch.complex64, generator=drawn)
    d = torch.randn(kspace.shape, dtype=torch.complex64, generator=drawn)
    there = torch.where(mask, lowrank._kspace(m[:, :, None] * maps), 0)
    back = lowrank._combined(lowrank._image(torch.where(mask, d, 0)), maps)
    torch.testing.assert_close((there * d.conj()).sum(), (m * back.conj()).sum(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(lowrank._back(lowrank._hybrid(kspace)), kspace)


def test_shrinking_is_that_of_singular_values_and_of_frequencies() -> None:
    """Against torch's own singular values; a frequency below the threshold is gone, one above is nearer to zero."""
    drawn = torch.Generator().manual_seed(2)
    m = torch.randn(2, 3, 8, 6, 5, dtype=torch.complex64, generator=drawn)
    by = torch.full((2, 3), 4.0)
    u, s, v = torch.linalg.svd(m.flatten(3).mT, full_matrices=False)
    wanted = (u * (s - 4.0).clamp(min=0)[..., None, :]) @ v
    torch.testing.assert_close(lowrank._shrink_rank(m, by).flatten(3).mT, wanted, rtol=1e-3, atol=1e-4)
    size, left = (lowrank._frequencies(x).abs() for x in (m, lowrank._shrink_frequencies(m, torch.full((2, 3), 1.0))))
    torch.testing.assert_close(left, (size - 1).clamp(min=0), rtol=1e-4, atol=1e-5)


def test_acquired_lines_stay_and_the_others_come_nearer_than_those_of_neighbouring_frames() -> None:
    kspace, sampled = scan()
    mask = sampled[:, :, None, :, :, None].expand(kspace.shape)
    shared = view_shared(kspace, sampled)
    found = low_rank_sparse(kspace, sampled, shared, iterations=40, rank_threshold=0.01, sparse_threshold=0.05)
    assert torch.equal(found[mask], kspace[mask])
    assert error(found, kspace) < 0.5 * error(shared, kspace)


def test_a_still_image_of_all_lines_is_left_as_it_is() -> None:
    kspace, sampled = scan()
    still = kspace.mean(3, keepdim=True).expand_as(kspace).contiguous()
    found = low_rank_sparse(still, torch.ones_like(sampled), still)
    torch.testing.assert_close(found, still, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", [1e-3, 250.0])
def test_thresholds_go_with_the_scale(factor: float) -> None:
    kspace, sampled = scan()
    guess = view_shared(kspace, sampled)
    once = low_rank_sparse(kspace, sampled, guess, iterations=5)
    scaled = low_rank_sparse(factor * kspace, sampled, factor * guess, iterations=5)
    torch.testing.assert_close(scaled / factor, once, rtol=1e-3, atol=1e-3)


def test_an_absent_slice_stays_empty_and_changes_no_other() -> None:
    kspace, sampled = scan()
    kspace[0, 1], sampled[0, 1] = 0, False
    found = low_rank_sparse(kspace, sampled, view_shared(kspace, sampled), iterations=5)
    assert not found[0, 1].any()
    assert bool(torch.isfinite(torch.view_as_real(found)).all())
    alone = low_rank_sparse(kspace[:, :1], sampled[:, :1], view_shared(kspace[:, :1], sampled[:, :1]), iterations=5)
    torch.testing.assert_close(found[:, :1], alone, rtol=1e-4, atol=1e-5)
    assert ifft2c(found).isfinite().all()
