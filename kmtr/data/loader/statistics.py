"""Population statistics that normalise lines and images: estimated on training subjects only, kept in fp32."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader import pipeline
from kmtr.data.loader.order import permutation
from kmtr.physics.cycle import clean_parts
from kmtr.physics.fourier import centred, magnitude_image
from kmtr.physics.images import scale_image
from kmtr.physics.lines import compress, phase_gain, readout, shared_centre, static_part

MAX_SUBJECTS = 256
MIN_VARIANCE = 1e-6
"""Least variance of a component, over the largest: below it lies rounding, which is not amplified."""
MIN_SUBJECTS_FOR_MEAN = 16
"""A mean over fewer hearts is those hearts: subtracting it would hide them from the model."""


@dataclass(frozen=True)
class Statistics:
    """Dataset statistics of canonical lines (see physics.lines), as tokens hold them, and of images of unit RMS.

    Attributes (the readout is all of kx, or x of the band that tokens hold):
        static_mean: population mean of the static part.
        static_sd: SD of the static part around it; floored where the population does not vary.
        dynamic_sd: SD of the dynamic part, over subjects and frames.
        image_mean: population mean of the magnitude images over subjects and frames.
        image_sd: one SD for all pixels.
    """

    static_mean: Complex[Tensor, "slice coil ky readout"]
    static_sd: Float[Tensor, "slice coil ky readout"]
    dynamic_sd: Float[Tensor, "slice coil ky readout"]
    image_mean: Float[Tensor, "slice y x"]
    image_sd: Float[Tensor, ""]

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def tables(config: RunConfig, reader: Reader) -> dict[str, Tensor]:
    """All that a run has to know of its population: `fit`, `components` where they are alignment's teacher, and
    `centre` where the encoder sees it.
    """
    found = fit(config, reader).tensors() | (components(config, reader) if config.has_components else {})
    return found | (centre(config, reader) if config.model.centre else {})


def fit(config: RunConfig, reader: Reader) -> Statistics:
    """Statistics of up to 256 training subjects, chosen by the seed: the same for any number of workers."""
    rows = permutation(config.seed, 0, len(reader))[:MAX_SUBJECTS]
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    model, nx = config.model, config.data.matrix[1]
    hybrid = model.readout == "hybrid"
    samples = model.readout_samples(nx) if hybrid else nx

    def add(name: str, values: Tensor, present: Tensor, axes: tuple[int, ...]) -> None:
        present = present.to(values.real.dtype)
        shape = [n for axis, n in enumerate(values.shape) if axis not in axes]
        total = (values * present).sum(axes).to(torch.complex128 if values.is_complex() else torch.float64)
        seen = present.expand(values.shape).sum(axes).to(torch.float64)
        sums[name] = sums.get(name, torch.zeros(shape, dtype=total.dtype)) + total
        counts[name] = counts.get(name, torch.zeros(shape, dtype=torch.float64)) + seen

    for host in pipeline.read_in_order(reader, np.asarray(rows).tolist(), 8, config):
        batch = host.to(torch.device("cpu"))
        present = ~batch.padded
        coils = torch.arange(model.coils or config.data.coils) < batch.extent[..., :1]
        known = torch.ones(samples, dtype=torch.bool)  # along x; along kx a smaller matrix leaves some without data
        if not hybrid:
            known = centred(batch.extent[..., 2], nx)[:, :, None]
        inside = coils[..., None] & known
        visible = batch.kspace.abs().sum((2, -1)) > 0  # all that the source acquired
        kspace = compress(batch.kspace, visible, model.coils, model.readout_samples(nx))
        factor = phase_gain(kspace, visible, model.remove, model.readout_samples(nx))
        lines = readout(kspace / factor[..., None, None, None], samples, hybrid)
        static = static_part(lines, visible)
        seen = visible[:, :, None, :, :, None] & inside[:, :, :, None, None]
        ever = seen.any(3)
        add("mean", static, ever, (0,))
        add("square", static.abs().square(), ever, (0,))
        add("dynamic", (lines - static[:, :, :, None]).abs().square(), seen, (0, 3))
        image = magnitude_image(batch.kspace)
        image = scale_image(image, batch.padded)
        add("image", image, present[..., None, None], (0, 2))
        add("image_square", image.square(), present[..., None, None], (0, 1, 2, 3, 4))

    def mean(name: str) -> Tensor:
        return sums[name] / counts[name].clamp(min=1)

    static_mean, static_square = mean("mean"), mean("square")
    if len(rows) < MIN_SUBJECTS_FOR_MEAN:
        static_mean = torch.zeros_like(static_mean)
    image_mean = mean("image") if len(rows) >= MIN_SUBJECTS_FOR_MEAN else torch.zeros_like(mean("image"))
    variance = mean("image_square") - image_mean.square().mean()
    return Statistics(
        static_mean=static_mean.to(torch.complex64),
        static_sd=_floored((static_square - static_mean.abs().square()).clamp(min=0).sqrt()),
        dynamic_sd=_floored(mean("dynamic").sqrt()),
        image_mean=image_mean.float(),
        image_sd=variance.clamp(min=1e-12).sqrt().float(),
    )


def components(config: RunConfig, reader: Reader) -> dict[str, Tensor]:
    """Tables of `model.teacher.Components` of the same training subjects as `fit` sees.

    Returns:
        for ``static`` and ``dynamic`` the mean ``{part}_clean_mean`` of every slice, ``slice pixel``, and the basis
        ``{part}_clean_basis``, ``pixel model.projection``: eigenvectors of the covariance within slices, largest first,
        over the fourth root of their variance, together scaled to unit total variance; the largest pixel of each is
        positive.
    """
    rows = permutation(config.seed, 0, len(reader))[:MAX_SUBJECTS]
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    count = torch.zeros(config.data.slices, 1, dtype=torch.float64)
    for host in pipeline.read_in_order(reader, np.asarray(rows).tolist(), 8, config):
        batch = host.to(torch.device("cpu"))
        present = (~batch.padded).any(-1)
        count += present.sum(0)[:, None]
        for part, values in zip(("static", "dynamic"), clean_parts(batch.kspace, batch.padded), strict=True):
            x = values.double() * present[..., None]
            sums[part] = sums.get(part, torch.zeros_like(x[0])) + x.sum(0)
            squares[part] = squares.get(part, x.new_zeros(2 * x.shape[-1:])) + x.flatten(0, 1).T @ x.flatten(0, 1)
    tables = {}
    for part, total in sums.items():
        mean = total / count.clamp(min=1)
        covariance = (squares[part] - total.T @ mean) / count.sum()
        variance, vectors = torch.linalg.eigh(covariance)
        variance, vectors = variance.flip(0), vectors.flip(1)
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # else chance decides
        width = config.model.projection
        variance = nn.functional.pad(variance, (0, max(0, width - len(variance))))[:width]
        vectors = nn.functional.pad(vectors, (0, max(0, width - vectors.shape[1])))[:, :width]
        spread = variance.clamp(min=MIN_VARIANCE * float(variance.max().clamp(min=1e-30))).sqrt()
        tables[f"{part}_clean_mean"] = mean.float()
        tables[f"{part}_clean_basis"] = (vectors / spread.sqrt() / spread.sum().sqrt()).float().contiguous()
    return tables


def centre(config: RunConfig, reader: Reader) -> dict[str, Tensor]:
    """Tables of `model.tokenizers.Centre` of the same training subjects as `fit` sees, all lines of theirs.

    Returns:
        ``centre_mean`` ``slice pixel``, the mean over subjects and frames; ``centre_still`` and ``centre_moving``, SD
        over all pixels of a subject's mean over the cycle and of the deviation from it.
    """
    rows = permutation(config.seed, 0, len(reader))[:MAX_SUBJECTS]
    side = config.model.centre
    total = torch.zeros(config.data.slices, side * side, dtype=torch.float64)
    count, still, moving, frames = torch.zeros(config.data.slices, 1, dtype=torch.float64), 0.0, 0.0, 0
    for host in pipeline.read_in_order(reader, np.asarray(rows).tolist(), 8, config):
        batch = host.to(torch.device("cpu"))
        image, mean = shared_centre(batch.kspace, batch.acquired, batch.padded, side)
        there, present = (~batch.padded).any(2), ~batch.padded
        count += there.sum(0)[:, None]
        total += (mean[:, :, 0] * there[..., None]).double().sum(0)
        still += float((mean[:, :, 0] * there[..., None]).double().square().sum())
        moving += float(((image - mean) * present[..., None]).double().square().sum())
        frames += int(present.sum())
    mean_of_slice = total / count.clamp(min=1)
    if len(rows) < MIN_SUBJECTS_FOR_MEAN:
        mean_of_slice = torch.zeros_like(mean_of_slice)
    spread = (still - float((mean_of_slice.square() * count).sum())) / (float(count.sum()) * side * side)
    return {
        "centre_mean": mean_of_slice.float(),
        "centre_still": torch.tensor(max(spread, 1e-12)).sqrt(),
        "centre_moving": torch.tensor(max(moving / (frames * side * side), 1e-12)).sqrt(),
    }


def _floored(sd: Tensor) -> Float[Tensor, ...]:
    """At least 1e-4 of the largest, so that noise-free corners of k-space are not blown up."""
    return sd.clamp(min=1e-4 * float(sd.max().clamp(min=1e-12))).float()
