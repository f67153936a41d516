"""Augmentation of k-space that a scanner could have measured: lines and their pattern change together.

Each kind is drawn from a stream of its own by (seed, epoch, subject), some by slice too, so that it is the same for
any number of workers. With k the signed index from the centre n // 2 and r the pixel likewise:

    mirror    x(r) -> x(-r)              k -> -k; in an even extent the line -n / 2 is its own mirror image
    rotate    x(r) -> x(M r)             quarter turns of the index, then three shears (FFT along one axis each)
    shift     x(r) -> x(r - s n)         phase exp(-2 pi i k s), s in fields of view, whatever n is
    phase     x -> exp(i phi) x          one phi per slice
    dropout   silent coils               one stays in every slice, the rest is not made louder
    noise     complex normal             on acquired lines

Masks follow mirror, rotation and shift of the same draw (`augment_masks`); the other kinds move nothing.

A subject sits in the middle of its array, in an `extent` of its own, with nothing around it: the field of view is the
extent's, the array only interpolates its pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Complex, Float, Int, UInt8
from torch import Tensor

from kmtr.config import Augment
from kmtr.physics import random, sampling
from kmtr.physics.masks import interpolate

SAMPLES_AT_A_TIME = 1 << 19
"""Subjects are rotated, and given noise, in parts of about so many samples (one subject at least): intermediate results
stay small beside the batch, and on a CPU it is faster too.
"""


@dataclass(frozen=True)
class Motion:
    """Drawn motion of each subject, in the order in which it is applied; None: that kind is off.

    Attributes:
        mirrored: y, x are reversed.
        angle: of the rotation, in rad.
        share: shift (y, x) in fields of view.
    """

    mirrored: Bool[Tensor, "batch 2"] | None
    angle: Float[Tensor, " batch"] | None
    share: Float[Tensor, "batch 2"] | None

    @staticmethod
    def draw(config: Augment, seed: int, epoch: Int[Tensor, " batch"], key: Int[Tensor, " batch"]) -> Motion:
        """Arguments as of `augment`."""

        def within(purpose: int, most: float, *shape: int) -> Tensor | None:
            return (2 * random.uniform(seed, epoch, key, purpose, shape) - 1) * most if most else None

        return Motion(
            random.uniform(seed, epoch, key, random.FLIP, (2,)) < 0.5 if config.flip else None,
            within(random.ROTATION, math.radians(config.rotation_deg)),
            within(random.SHIFT, config.shift, 2),
        )


def augment(
    kspace: Complex[Tensor, "batch slice coil t ky kx"],
    acquired: Bool[Tensor, "batch slice t ky"],
    extent: Int[Tensor, "batch 2"],
    config: Augment,
    seed: int,
    epoch: Int[Tensor, " batch"],
    key: Int[Tensor, " batch"],
    given: Bool[Tensor, " batch"],
) -> tuple[Complex[Tensor, "batch slice coil t ky kx"], Bool[Tensor, "batch slice t ky"]]:
    """Augment every subject; what is off in `config` costs nothing, and with all of it off the arguments return.

    Args:
        kspace: as the source acquired it, zero elsewhere; left as it is.
        acquired: lines with data: False in padding and beyond the extent, as noise goes wherever it is True.
        extent: each subject's own (ny, nx), in the middle of the array.
        seed, epoch, key: as of `random.uniform`.
        given: undersampled by its scanner. Such a subject is not rotated, since its lines would no longer be lines.

    Returns:
        k-space and `acquired`, mirrored with it; no energy outside of it.
    """
    slices, coils, nx = *kspace.shape[1:3], kspace.shape[-1]

    def draw(purpose: int, *shape: int) -> Tensor:
        return random.uniform(seed, epoch, key, purpose, shape)

    motion = Motion.draw(config, seed, epoch, key)
    if motion.mirrored is not None:
        kspace, acquired = mirror(kspace, acquired, extent, motion.mirrored)
    if motion.angle is not None:
        kept = acquired[:, :, None, :, :, None] & _own(nx, extent[:, 1])[:, None, None, None, None]
        turned = torch.where(kept, rotate(kspace, motion.angle, extent), 0)
        kspace = torch.where(given[:, None, None, None, None, None], kspace, turned)
    if motion.share is not None:
        kspace = shift(kspace, motion.share)
    if config.phase:
        angle = 2 * math.pi * draw(random.PHASE, slices)
        kspace = kspace * torch.polar(torch.ones_like(angle), angle)[:, :, None, None, None, None]
    if not (config.coil_dropout or config.noise):
        return kspace, acquired
    energy = torch.view_as_real(kspace).square().sum((3, 4, 5, 6))
    heard = live = energy > 0  # slots of coils that the source does not have hold zeros
    if config.coil_dropout:
        heard = live & ~sampling.hide(draw(random.COIL_DROPOUT, slices, coils), live, config.coil_dropout)
        kspace = torch.where(heard[..., None, None, None], kspace, 0)
    if config.noise:
        samples = acquired.sum((2, 3))[:, :, None] * extent[:, 1, None, None] * live
        rms = (energy.sum((1, 2)) / samples.sum((1, 2)).clamp(min=1)).sqrt()
        level = draw(random.NOISE_LEVEL) * config.noise * rms
        kspace = _add_noise(kspace, acquired[:, :, None] & heard[..., None, None], extent, level, seed, epoch, key)
    return kspace, acquired


def augment_masks(
    masks: UInt8[Tensor, "batch slice t y x"],
    extent: Int[Tensor, "batch 2"],
    config: Augment,
    seed: int,
    epoch: Int[Tensor, " batch"],
    key: Int[Tensor, " batch"],
    given: Bool[Tensor, " batch"],
) -> UInt8[Tensor, "batch slice t y x"]:
    """Masks moved as `augment` moves the image, by the same draw; all arguments but `masks` as there.

    A pixel takes the largest class of the four that it came from by their linear weights, and is UNLABELLED where more
    than half of the weight is unlabelled or lies outside of the field of view: the image is periodic there, the heart
    is not. So the first row (column) of an even matrix is UNLABELLED once y (x) is mirrored.

    Args:
        masks: on a grid over the whole field of view, of any size.
    """
    if not (config.flip or config.rotation_deg or config.shift):
        return masks
    ny, nx = masks.shape[-2:]
    y, x = _sources(Motion.draw(config, seed, epoch, key), extent, given, ny, nx)
    moved = torch.empty_like(masks)
    for part in _parts(masks):
        moved[part] = interpolate(masks[part], y[part] + ny // 2, x[part] + nx // 2, unlabelled=0.5)
    return moved


def _sources(
    motion: Motion, extent: Int[Tensor, "batch 2"], given: Bool[Tensor, " batch"], ny: int, nx: int
) -> tuple[Float[Tensor, "batch {ny} {nx}"], Float[Tensor, "batch {ny} {nx}"]]:
    """Positions, from the centre, that pixels of ny x nx had before their motion: its steps undone, the last first."""
    y = _signed(ny, given.device).float()[:, None].expand(len(given), ny, nx)
    x = _signed(nx, given.device).float().expand(len(given), ny, nx)
    if motion.share is not None:
        share = motion.share[..., None, None]
        y, x = y - share[:, 0] * ny, x - share[:, 1] * nx
    if motion.angle is not None:
        angle = torch.where(given, 0, motion.angle)[:, None, None].double()  # rounded alike whatever the batch's size
        cosine, sine = angle.cos().float(), angle.sin().float()
        own = extent.clamp(min=1)[..., None, None]
        aspect = (own[:, 1] / nx) / (own[:, 0] / ny)
        y, x = cosine * y + sine * aspect * x, cosine * x - sine / aspect * y
    if motion.mirrored is not None:
        mirrored = motion.mirrored[..., None, None]
        y, x = torch.where(mirrored[:, 0], -y, y), torch.where(mirrored[:, 1], -x, x)
    return y, x


def shift(
    kspace: Complex[Tensor, "batch slice coil t ky kx"], share: Float[Tensor, "batch 2"]
) -> Complex[Tensor, "batch slice coil t ky kx"]:
    """Move each subject by `share` (y, x) of the field of view, to greater indices; what leaves returns opposite."""
    ny, nx = kspace.shape[-2:]
    y = _turn(-share[:, :1] * _signed(ny, kspace.device))
    x = _turn(-share[:, 1:] * _signed(nx, kspace.device))
    return kspace * (y[:, :, None] * x[:, None])[:, None, None, None]


def mirror(
    kspace: Complex[Tensor, "batch slice coil t ky kx"],
    acquired: Bool[Tensor, "batch slice t ky"],
    extent: Int[Tensor, "batch 2"],
    axes: Bool[Tensor, "batch 2"],
) -> tuple[Complex[Tensor, "batch slice coil t ky kx"], Bool[Tensor, "batch slice t ky"]]:
    """Reverse y, x or both of each subject about the centre, and its pattern with it."""
    ny, nx = kspace.shape[-2:]
    ky, kx = _signed(ny, kspace.device), _signed(nx, kspace.device)
    ky = torch.where(axes[:, :1], _reverse(ky, extent[:, :1]), ky)
    kx = torch.where(axes[:, 1:], _reverse(kx, extent[:, 1:]), kx)
    place = (ky + ny // 2)[:, None, None].expand(acquired.shape)
    return _take(kspace, ky[:, :, None], kx[:, None]), acquired.gather(-1, place)


def rotate(
    kspace: Complex[Tensor, "batch slice coil t ky kx"],
    angle: Float[Tensor, " batch"],
    extent: Int[Tensor, "batch 2"],
) -> Complex[Tensor, "batch slice coil t ky kx"]:
    """Rotate each subject about the centre by `angle` in rad, in the direction of `torch.rot90` from y to x.

    A quarter turn (of a square extent; a half turn of any) permutes k-space; what is left, at most 45 degrees (90), is
    three shears, each a linear phase per row along one axis: interpolation by the FFT, unitary, what leaves the field
    of view returns opposite (Unser, Thevenaz and Yaroslavsky 1995; Larkin, Oldfield and Klemm 1997). Pixels are taken
    as square in the extent.
    """
    square = extent[:, 0] == extent[:, 1]
    quarters = torch.where(square, (angle * (2 / math.pi)).round(), 2 * (angle / math.pi).round())
    rest = angle - quarters * (math.pi / 2)
    turned = torch.empty_like(kspace)
    for part in _parts(kspace):
        turned[part] = _shear(
            _quarter_turns(kspace[part], quarters[part].long() % 4, extent[part]), rest[part], extent[part]
        )
    return turned


def _shear(
    kspace: Complex[Tensor, "batch slice coil t ky kx"], angle: Float[Tensor, " batch"], extent: Int[Tensor, "batch 2"]
) -> Complex[Tensor, "batch slice coil t ky kx"]:
    """Rotation by `angle` in rad as shears along x by -tan(angle / 2), along y by sin(angle), and along x again."""
    ny, nx = kspace.shape[-2:]
    # In here the centre of both domains is at index 0, where the FFT has it. Each shear is applied where one axis is
    # k-space and the other the image; row i of the array is row i * ny_extent / ny of the extent.
    i, j = (torch.fft.ifftshift(_signed(n, kspace.device)) for n in (ny, nx))
    aspect = extent[:, 0] / extent[:, 1]
    by_row = _turn(-((angle / 2).tan() * aspect)[:, None, None] * (i / ny)[:, None] * j)[:, None, None, None]
    by_column = _turn((angle.sin() / aspect)[:, None, None] * i[:, None] * (j / nx))[:, None, None, None]
    x = torch.fft.ifftshift(kspace, (-2, -1))
    x = torch.fft.ifft(x, dim=-2, norm="ortho").mul_(by_row)
    x = torch.fft.ifft(torch.fft.fft(x, dim=-2, norm="ortho"), dim=-1, norm="ortho").mul_(by_column)
    x = torch.fft.ifft(torch.fft.fft(x, dim=-1, norm="ortho"), dim=-2, norm="ortho").mul_(by_row)
    return torch.fft.fftshift(torch.fft.fft(x, dim=-2, norm="ortho"), (-2, -1))


def _quarter_turns(
    kspace: Complex[Tensor, "batch slice coil t ky kx"],
    quarters: Int[Tensor, " batch"],
    extent: Int[Tensor, "batch 2"],
) -> Complex[Tensor, "batch slice coil t ky kx"]:
    """`quarters` (0 to 3) times 90 degrees as a permutation; odd numbers only of a square extent."""
    batch, (ny, nx) = len(kspace), kspace.shape[-2:]
    ky = _signed(ny, kspace.device)[:, None]
    kx = _signed(nx, kspace.device)
    # x(M r) has the transform K(M k), and a quarter turn is M: (y, x) -> (x, -y).
    cycle = (ky, kx, _reverse(ky, extent[:, :1, None]), _reverse(kx, extent[:, 1:, None]))
    sources = torch.stack([part.expand(batch, ny, nx) for part in cycle])
    own = _own(ny, extent[:, 0])[:, :, None] & _own(nx, extent[:, 1])[:, None]
    y, x = (sources.gather(0, ((quarters + i) % 4).view(1, -1, 1, 1).expand(1, batch, ny, nx))[0] for i in (0, 1))
    return _take(kspace, torch.where(own, y, ky), torch.where(own, x, kx))


def _take(
    kspace: Complex[Tensor, "batch slice coil t ky kx"], y: Int[Tensor, "batch _ _"], x: Int[Tensor, "batch _ _"]
) -> Complex[Tensor, "batch slice coil t ky kx"]:
    """k-space from the signed indices (y, x), each subject from its own."""
    ny, nx = kspace.shape[-2:]
    place = ((y + ny // 2) * nx + x + nx // 2).flatten(1)[:, None, None, None]
    flat = kspace.flatten(-2)
    return flat.gather(-1, place.expand(flat.shape)).view(kspace.shape)


def _add_noise(
    kspace: Complex[Tensor, "batch slice coil t ky kx"],
    lines: Bool[Tensor, "batch slice coil t ky"],
    extent: Int[Tensor, "batch 2"],
    level: Float[Tensor, " batch"],
    seed: int,
    epoch: Int[Tensor, " batch"],
    key: Int[Tensor, " batch"],
) -> Complex[Tensor, "batch slice coil t ky kx"]:
    """Complex normal noise of standard deviation `level` on `lines`, within the extent of the readout."""
    shape = kspace.shape[1:]
    origin = (0, 0, 0, shape[-2] // 2, shape[-1] // 2)
    noisy = kspace.clone()
    for part in _parts(kspace):
        noise = random.complex_normal(seed, epoch[part], key[part], random.NOISE, shape, origin)
        scale = level[part, None, None] * _own(shape[-1], extent[part, 1])[:, None]
        noisy[part] += noise.mul_(lines[part][..., None] * scale[:, None, None, None])
    return noisy


def _parts(kspace: Tensor) -> Iterator[slice]:
    """The batch in parts of SAMPLES_AT_A_TIME, of one subject at least."""
    rows = max(1, SAMPLES_AT_A_TIME // max(1, kspace[0].numel()))
    return (slice(start, start + rows) for start in range(0, len(kspace), rows))


def _signed(n: int, device: torch.device) -> Int[Tensor, " n"]:
    """Index from the centre: frequency, or pixel."""
    return torch.arange(n, device=device) - n // 2


def _reverse(k: Int[Tensor, "*shape"], extent: Int[Tensor, "*rest"]) -> Int[Tensor, "*result"]:
    """Minus k within an extent; the line -n / 2 of an even extent, and all beyond, stay."""
    return torch.where(k.abs() <= (extent - 1) // 2, -k, k)


def _own(n: int, extent: Int[Tensor, " batch"]) -> Bool[Tensor, "batch {n}"]:
    """True where an axis of n belongs to a subject: its own matrix, in the middle."""
    k = _signed(n, extent.device)
    return (k >= -(extent // 2)[:, None]) & (k < (extent - extent // 2)[:, None])


def _turn(turns: Float[Tensor, "*shape"]) -> Complex[Tensor, "*shape"]:
    """exp(2 pi i turns)."""
    return torch.polar(torch.ones_like(turns), 2 * math.pi * turns)
