"""Receiver coils: the phase and the sensitivities that they give to an image, and the ways back to fewer coils or one.

    acquired:   mix (prewhitening), compress (virtual coils), combined
    images:     adaptive_sensitivities, combine, root_sum_of_squares
    simulated:  phase_map, sensitivities

Positions are in halves of the field of view, so that the image covers [-1, 1] along either axis and pixel n // 2 sits
at 0: a map is the same function of position at every matrix size.
"""

from __future__ import annotations

import math

import numpy as np

from kmtr.physics.fourier import fft2c, ifft2c
from kmtr.physics.noise import Purpose, generator
from kmtr.types import InputError

MOST_COILS = 32

ARRAY_RADII = (1.7, 2.1)
"""Half-axes of the array around the body (drawn in this range): no wire ever comes near the image, whose corners are
at 1.42, so that the maps are smooth.
"""
LARGEST_LOOP = 0.9
OVERLAP = 1.15
"""Diameter of a loop over the distance to its neighbour: loops of an array overlap a little (Roemer 1990)."""


def phase_map(matrix: tuple[int, int], *, seed: int, subject: int, slice_index: int, wraps: float = 1.0) -> np.ndarray:
    """A smooth random phase, shared by all frames of one slice; float32 ``y x`` in rad.

    A random cubic polynomial of the position stretched to a span (greatest minus least phase) uniform in
    [0, 2 pi `wraps`], plus a constant uniform in [0, 2 pi). Being defined on [-1, 1]^2 it is the same function of
    position at every matrix size. Pure function of (seed, subject, slice_index), `matrix` and `wraps`.

    Args:
        matrix: pixels along y and x.
        wraps: greatest number of full turns across the field of view.
    """
    rng = generator(seed, subject, Purpose.PHASE, slice_index)
    coefficients = rng.standard_normal((4, 4))
    span, offset = 2 * np.pi * rng.random(2) * (wraps, 1.0)
    order = np.add.outer(np.arange(4), np.arange(4))
    coefficients[(order == 0) | (order > 3)] = 0
    field = np.polynomial.polynomial.polygrid2d(*_positions(matrix), coefficients)
    return (offset + span * field / np.ptp(field)).astype(np.float32)


def sensitivities(matrix: tuple[int, int], coils: int, *, seed: int, subject: int, slice_index: int) -> np.ndarray:
    """Sensitivity of every receiver coil over one slice, complex64 ``coil y x``; the sum of squares is 1 in each pixel.

    A coil sees Bx - i By of the field that a unit current in it would make (Hoult and Richards 1976), B0 along z. Coils
    are circular loops on an elliptic cylinder around the body, facing its axis: one ring of up to 8, two staggered
    ones of up to 16, else three. The array belongs to the subject; each slice is a plane of its own through it, shifted
    along its normal and tilted. One coil is uniform: 1.

    Pure function of (seed, subject, slice_index), `matrix` and `coils`.

    Raises:
        InputError: no coil, or more than MOST_COILS.
    """
    if not 1 <= coils <= MOST_COILS:
        raise InputError(f"coils: expected 1 to {MOST_COILS} of them, got {coils}")
    if coils == 1:
        return np.ones((1, *matrix), np.complex64)
    centres, normals, radius = _array(coils, seed=seed, subject=subject)
    points = _plane(matrix, generator(seed, subject, Purpose.SLICE_IN_ARRAY, slice_index))
    fields = [_loop_field(points - c, n, radius) for c, n in zip(centres, normals, strict=True)]
    maps = np.stack([field[..., 0] - 1j * field[..., 1] for field in fields])
    return (maps / np.sqrt((np.abs(maps) ** 2).sum(0))).astype(np.complex64)


def mix(kspace: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Other coils as weighted sums of these: complex64 ``slice coil t ky kx`` by ``new coil`` or ``slice new coil``.

    Its adjoint is mixing by the matrix's conjugate transpose.
    """
    flat = kspace.reshape(*kspace.shape[:2], -1)
    return (matrix.astype(np.complex64) @ flat).reshape(len(kspace), matrix.shape[-2], *kspace.shape[2:])


def compress(kspace: np.ndarray, sampled: np.ndarray | None, coils: int) -> np.ndarray:
    """The most energetic `coils` virtual coils of each slice, complex64 ``slice coil t ky kx``; never more than given.

    Each slice's coils are projected on their leading principal directions, told by its acquired lines alone (Huang
    2008, "A software channel compression technique"). What is left out is orthogonal to what stays, and
    white noise stays white. A direction has no phase of its own, so its largest weight is real and positive: the same
    study always gives the same virtual coils.

    Args:
        sampled: acquired lines, bool ``slice t ky``; None: all.
    """
    if coils >= kspace.shape[1]:
        return kspace
    matrices = []
    for n, slice_ in enumerate(kspace):
        lines = slice_.reshape(len(slice_), -1) if sampled is None else slice_[:, sampled[n]].reshape(len(slice_), -1)
        _, vectors = np.linalg.eigh((lines @ lines.conj().T).astype(np.complex128))
        leading = vectors[:, ::-1][:, :coils]
        largest = np.take_along_axis(leading, np.abs(leading).argmax(0)[None], 0)
        matrices.append((leading * np.exp(-1j * np.angle(largest))).conj().T)
    return mix(kspace, np.stack(matrices))


def combined(kspace: np.ndarray) -> np.ndarray:
    """One coil, complex64 ``slice 1 t ky kx``, of fully sampled k-space: its adaptive combination, frames sharing maps.

    Unlike the one virtual coil of `compress` it loses no part of the image that other coils see. It needs all lines,
    since sensitivities multiply the image.
    """
    joined = np.empty((len(kspace), 1, *kspace.shape[2:]), np.complex64)
    for slice_, out in zip(kspace, joined, strict=True):
        images = ifft2c(slice_)
        out[0] = fft2c(combine(images, adaptive_sensitivities(images)[:, None]))
    return joined


def adaptive_sensitivities(images: np.ndarray, window: int = 5) -> np.ndarray:
    """Sensitivities told from the images alone, complex64 ``coil y x``; the sum of squares is 1 in each pixel.

    The leading eigenvector of the coils' correlations over all frames and `window` x `window` pixels (Walsh, Gmitro and
    Marcellin 2000), by power iteration. Its phase is free in each pixel: that of the coil of most energy is taken off,
    so that the combined image has that coil's phase.

    Args:
        images: complex ``coil t y x``.
    """
    from scipy.ndimage import uniform_filter  # half a second, which a training worker need not pay

    coils = len(images)
    correlation = np.empty((*images.shape[2:], coils, coils), np.complex64)
    for a in range(coils):
        for b in range(a + 1):
            product = (images[a] * images[b].conj()).sum(0)
            smooth = uniform_filter(product.real, window) + 1j * uniform_filter(product.imag, window)
            correlation[..., a, b], correlation[..., b, a] = smooth, smooth.conj()
    reference = int(np.abs(images).sum((1, 2, 3)).argmax())
    vector = correlation[..., reference, None]  # never orthogonal to the answer where the reference coil sees anything
    for _ in range(8):
        length = np.linalg.norm(vector, axis=-2, keepdims=True)
        vector = correlation @ (vector / np.where(length > 0, length, 1))
    maps = np.moveaxis(vector[..., 0], -1, 0)
    maps = maps * np.exp(-1j * np.angle(maps[reference]))
    length = np.linalg.norm(maps, axis=0)
    return np.where(length > 0, maps / np.where(length > 0, length, 1), 1 / math.sqrt(coils)).astype(np.complex64)


def combine(images: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Sum over the first axis, weighted by sensitivities: the SNR is the highest where noise is white (Roemer 1990).

    The adjoint of multiplying by `maps`, and for maps of unit sum of squares its inverse.
    """
    return (maps.conj() * images).sum(0)


def root_sum_of_squares(images: np.ndarray) -> np.ndarray:
    """Magnitude over all coils, the first axis."""
    return np.sqrt((images.real**2 + images.imag**2).sum(0))


def _positions(matrix: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels along y and x in halves of the field of view: pixel n // 2 at 0, as the centre of both domains is."""
    y, x = ((np.arange(n) - n // 2) / (n / 2) for n in matrix)
    return y, x


def _array(coils: int, *, seed: int, subject: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Centres and normals ``coil 3`` (x, y, z) of the loops around one subject, and their common radius."""
    rng = generator(seed, subject, Purpose.COIL_ARRAY)
    half_axes = rng.uniform(*ARRAY_RADII, 2)
    turn, along = rng.uniform(0, 2 * np.pi), rng.uniform(-0.2, 0.2)
    rings = 1 if coils <= 8 else 2 if coils <= 16 else 3
    per_ring = math.ceil(coils / rings)
    ring, place = np.divmod(np.arange(coils), per_ring)
    in_ring = np.bincount(ring)[ring]
    angle = turn + 2 * np.pi * (place + 0.5 * (ring % 2)) / in_ring
    radius = min(LARGEST_LOOP, OVERLAP * np.pi * float(half_axes.mean()) / per_ring)
    x, y = half_axes[:, None] * (np.cos(angle), np.sin(angle))
    z = along + 2 * radius / OVERLAP * (ring - (rings - 1) / 2)
    inward = -np.stack([x / half_axes[0] ** 2, y / half_axes[1] ** 2, np.zeros(coils)], -1)
    return np.stack([x, y, z], -1), inward / np.linalg.norm(inward, axis=-1, keepdims=True), radius


def _plane(matrix: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Points ``y x 3`` (x, y, z) of one slice: up to 0.4 off the middle of the array, tilted by some 20 degrees."""
    offset = rng.uniform(-0.4, 0.4)
    rotation = rng.normal(0, math.radians(20), 3)  # about x, y and z
    y, x = np.meshgrid(*_positions(matrix), indexing="ij")
    points = np.stack([x, y, np.full_like(x, offset)], -1)
    for axis, angle in enumerate(rotation):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turned = np.eye(3)
        turned[[i, i, j, j], [i, j, i, j]] = math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
        points = points @ turned.T
    return points


def _loop_field(points: np.ndarray, normal: np.ndarray, radius: float) -> np.ndarray:
    """Field ``... 3`` of a circular loop at the origin by the law of Biot and Savart, up to its constant mu0 I / pi.

    Closed form of Simpson, Lane, Immer and Youngquist (NASA, 2001), "Simple analytic expressions for the magnetic
    field of a circular current loop", equations 24 and 25, in cylindrical coordinates (rho, z) about the loop's axis.
    """
    from scipy.special import ellipe, ellipkm1

    z = points @ normal
    across = points - z[..., None] * normal
    rho = np.linalg.norm(across, axis=-1)
    square = rho**2 + z**2
    near, far = radius**2 + square - 2 * radius * rho, radius**2 + square + 2 * radius * rho
    k, e = ellipkm1(near / far), ellipe(1 - near / far)  # complete elliptic integrals
    scale = 1 / (2 * near * np.sqrt(far))
    axial = scale * ((radius**2 - square) * e + near * k)
    radial = scale * z * ((radius**2 + square) * e - near * k)  # over rho, and again over rho as `across` is that long
    return axial[..., None] * normal + (radial / np.maximum(rho**2, 1e-12))[..., None] * across
