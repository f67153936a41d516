"""k-space and images to tokens, in fp32 and outside of the engine (bf16 engines would cast the tables)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from kmtr.config import Data, Model
from kmtr.model.packing import Lengths, Places, gather, indices
from kmtr.physics.fourier import centred, crop_or_pad, magnitude_image
from kmtr.physics.images import scale_image
from kmtr.physics.lines import (
    compress,
    compression,
    mix,
    phase_gain,
    readout,
    readout_inverse,
    shared_centre,
    static_part,
)

LINE_TABLES = ("static_mean", "static_sd", "dynamic_sd")
FAINTEST = 1e-4
"""RMS, over the population's, below which a line is not blown up to unit RMS."""


@runtime_checkable
class Acquisition(Protocol):
    """Fields of a `data.loader.batch.Batch` that the tokenizers read; see there."""

    @property
    def kspace(self) -> Tensor: ...
    @property
    def padded(self) -> Tensor: ...
    @property
    def extent(self) -> Tensor: ...
    @property
    def slots(self) -> tuple[int, ...]: ...
    @property
    def same(self) -> bool: ...


@dataclass(frozen=True)
class Tokens(Places):
    """A sequence per subject, one after the other.

    Attributes:
        index: in the configuration's grid: (slice, t, ky) of lines, (slice, t, y, x) of patches.
        values: normalised content of the tokens.
        blank: features of a token that are no data (a smaller matrix, fewer coils); None: all are.
    """

    values: Float[Tensor, "token feature"]
    blank: Bool[Tensor, "token feature"] | None = None


class LineTokenizer:
    """Readout lines as tokens: real and imaginary part of the dynamic and the static part of a line.

    Coils are compressed where asked for, lines made canonical (physics.lines), then normalised (`model.normalisation`):

        population    the population mean is taken from the static part, both parts are divided by SD^power of the
                      population and scaled to unit variance
        line          each part is divided by its own RMS, whose decadic logarithm (over the population's RMS) follows
                      as one more complex number, its imaginary part zero
        none          one factor for all gives the population unit variance

    Everything is estimated from the lines that may be seen.

    Args:
        tables: `data.loader.statistics.Statistics.tensors()`.
    """

    def __init__(self, data: Data, model: Model, tables: dict[str, Tensor], device: torch.device):
        self.data, self.model = data, model
        nx = data.matrix[1]
        self.coils, self.samples = model.coils or data.coils, model.readout_samples(nx)
        self.kx = slice(nx // 2 - self.samples // 2, nx // 2 + self.samples // 2)
        self.hybrid = model.readout == "hybrid"
        self.parts_held = ("static",) if model.line_parts == "whole" else ("dynamic", "static")
        mean, static, dynamic = (crop_or_pad(tables[name], (self.samples,), (-1,)).to(device) for name in LINE_TABLES)
        self.mean, self.divisor = mean, {}
        for part, sd in (("static", static), ("dynamic", dynamic)):
            unit = sd.pow(2 - 2 * model.normalisation_power).mean().sqrt().clamp(min=torch.finfo(sd.dtype).tiny)
            self.divisor[part] = sd.pow(model.normalisation_power) * unit
        power = {"static": mean.abs().square().mean() + static.square().mean(), "dynamic": dynamic.square().mean()}
        if model.line_parts == "whole":
            power["static"] = power["static"] + power["dynamic"]
        if model.normalisation == "none":
            power = dict.fromkeys(power, torch.stack([power[part] for part in self.parts_held]).mean())
        self.rms = {part: square.sqrt() for part, square in power.items()}

    @staticmethod
    def features(data: Data, model: Model) -> int:
        parts, log_rms = 2 if model.line_parts == "static+dynamic" else 1, model.normalisation == "line"
        return 2 * parts * (model.readout_samples(data.matrix[1]) * (model.coils or data.coils) + log_rms)

    def __call__(
        self,
        batch: Acquisition,
        known: Bool[Tensor, "batch slice t ky"],
        chosen: Bool[Tensor, "batch slice t ky"],
        visible: Bool[Tensor, "batch slice t ky"] | None = None,
        lengths: Lengths | None = None,
    ) -> Tokens:
        """Tokens of the `chosen` lines.

        A batch of a smaller shape than the configuration's gives the same tokens as in a larger one: slices and lines
        get their place in the full grid, coils and readout samples that it lacks are blank.

        Args:
            known: lines that the temporal mean is taken over.
            visible: lines that coils, phase and gain are estimated from; `known` where not given.
            lengths: of `chosen`; see `packing.gather`.
        """
        visible = known if visible is None else visible
        kspace = compress(batch.kspace, visible, self.model.coils, self.samples)
        factor = phase_gain(kspace, visible, self.model.remove, self.samples)
        missing, height = self.coils - kspace.shape[2], kspace.shape[4]
        central = crop_or_pad(kspace, (min(self.samples, kspace.shape[5]),), (-1,))
        static = static_part(central, known)
        places = gather(chosen, lengths)
        row, (z, t, ky) = places.lengths.subject, places.index.unbind(-1)
        scale = factor[row, z][..., None]
        line, fixed = (
            readout(nn.functional.pad(part / scale, (0, 0, 0, missing)), self.samples, self.hybrid)
            for part in (central[row, z, :, t, ky], static[row, z, :, ky])
        )
        place = indices(batch.slots, kspace.device)[z]
        ky = ky + self.data.matrix[0] // 2 - height // 2
        split = {"static": line} if self.model.line_parts == "whole" else {"dynamic": line - fixed, "static": fixed}
        values = torch.stack([self._normalised(split[part], part, place, ky) for part in self.parts_held], dim=1)
        blank = None
        if not self._fills(batch):
            absent = self._absent(batch.extent[row, z]).flatten(1)
            absent = nn.functional.pad(absent, (0, values.shape[2] - absent.shape[1]))
            values = values.masked_fill(absent[:, None], 0.0)
            blank = absent[:, None, :, None].expand(*values.shape, 2).flatten(1)
        index = torch.stack([place, t, ky], dim=-1)
        return Tokens(places.lengths, index, torch.view_as_real(values).flatten(1), blank)

    def _normalised(
        self,
        lines: Complex[Tensor, "token coil readout"],
        part: str,
        z: Int[Tensor, " token"],
        ky: Int[Tensor, " token"],
    ) -> Complex[Tensor, "token number"]:
        """One part of canonical lines as tokens hold it."""
        if self.model.normalisation == "population":
            if part == "static":
                lines = lines - self.mean[z, :, ky]
            return (lines / self.divisor[part][z, :, ky]).flatten(1)
        if self.model.normalisation == "none":
            return (lines / self.rms[part]).flatten(1)
        rms = (lines.abs().square().mean((1, 2)).sqrt() / self.rms[part]).clamp(min=FAINTEST)[:, None]
        return torch.cat([lines.flatten(1) / (rms * self.rms[part]), rms.log10().to(lines.dtype)], dim=1)

    def _restored(
        self, numbers: Complex[Tensor, "token number"], part: str, z: Int[Tensor, " token"], ky: Int[Tensor, " token"]
    ) -> Complex[Tensor, "token coil readout"]:
        """Inverse of `_normalised`."""
        lines = numbers[:, : self.coils * self.samples].unflatten(1, (self.coils, self.samples))
        if self.model.normalisation == "population":
            lines = lines * self.divisor[part][z, :, ky]
            return lines + self.mean[z, :, ky] if part == "static" else lines
        if self.model.normalisation == "none":
            return lines * self.rms[part]
        return lines * (self.rms[part] * 10 ** numbers[:, -1].real)[:, None, None]

    def _absent(self, extent: Int[Tensor, "token 3"]) -> Bool[Tensor, "token coil readout"]:
        """True where a slice has no data for part of a token: missing coils and, along kx, a smaller matrix."""
        absent = torch.arange(self.coils, device=extent.device) >= extent[..., :1]
        if self.hybrid:
            return absent[..., None].expand(*absent.shape, self.samples)
        return absent[..., None] | ~centred(extent[..., 2], self.data.matrix[1])[..., None, self.kx]

    def _fills(self, batch: Acquisition) -> bool:
        """True if all subjects have the configuration's coils and all of the readout that enters a token."""
        full = self.kx.stop - self.kx.start
        return batch.same and batch.kspace.shape[2] >= self.coils and batch.kspace.shape[5] >= full

    def parts(
        self, values: Float[Tensor, "token feature"], index: Int[Tensor, "token axis"]
    ) -> tuple[Complex[Tensor, "token coil kx"], Complex[Tensor, "token coil kx"]]:
        """Static and dynamic part of canonical lines (central kx) from token values: inverse of the normalisation.

        With ``model.line_parts=whole`` all of a line is static and nothing dynamic.
        """
        z, _, ky = index.unbind(-1)
        split = torch.view_as_complex(values.float().unflatten(1, (len(self.parts_held), -1, 2)).contiguous())
        lines = {part: self._restored(split[:, i], part, z, ky) for i, part in enumerate(self.parts_held)}
        moving = lines.get("dynamic", torch.zeros_like(lines["static"]))
        return readout_inverse(lines["static"], self.hybrid), readout_inverse(moving, self.hybrid)

    def fill(
        self,
        kspace: Complex[Tensor, "batch slice coil t ky kx"],
        visible: Bool[Tensor, "batch slice t ky"],
        values: Float[Tensor, "token feature"],
        places: Places,
    ) -> Complex[Tensor, "batch slice coil t ky kx"]:
        """k-space with the visible lines as they are and predicted ones elsewhere (data consistency).

        Where a line was visible in other frames, their mean is its static part and only the dynamic part is predicted.
        Of compressed coils, predicted lines are what the virtual ones hold.
        """
        weights = compression(kspace, visible, self.model.coils, self.samples) if self.model.coils else None
        lines = kspace if weights is None else mix(kspace, weights)
        seen = visible.any(2)[:, :, None, None, :, None]
        static = static_part(lines, visible)[:, :, :, None]
        filled = torch.where(seen & (self.model.line_parts != "whole"), static, 0).expand(lines.shape).clone()
        row, (z, t, ky) = places.lengths.subject, places.index.unbind(-1)
        scale = phase_gain(lines, visible, self.model.remove, self.samples)[row, z][..., None]
        fixed, moving = self.parts(values, places.index)
        known = seen[row, z, 0, 0, ky] & (self.model.line_parts != "whole")
        central = filled[..., self.kx]
        central[row, z, :, t, ky] += scale * torch.where(known[..., None], moving, fixed + moving)
        filled = filled if weights is None else mix(filled, weights.mH)
        return torch.where(visible[:, :, None, :, :, None], kspace, filled)


class PatchTokenizer:
    """Magnitude images as 3D patches (t, y, x), population mean taken off, scaled by one SD."""

    def __init__(self, data: Data, model: Model, tables: dict[str, Tensor], device: torch.device):
        self.patch, self.matrix = model.patch, data.matrix
        self.mean = tables["image_mean"].to(device)
        self.sd = tables["image_sd"].to(device)

    @staticmethod
    def features(model: Model) -> int:
        pt, py, px = model.patch
        return pt * py * px

    def images(
        self, batch: Acquisition, visible: Bool[Tensor, "batch slice t ky"] | None = None
    ) -> Float[Tensor, "batch slice t y x"]:
        """Normalised magnitude images: unit RMS per subject, then the population's mean and SD taken off.

        All have the configuration's full matrix: k-space of a smaller one is filled up with zeros, which keeps the
        field of view and interpolates.

        Args:
            visible: lines that they are made of, zeros in place of the others, each frame by itself; None: all.
        """
        kspace = batch.kspace
        if visible is not None:
            kspace = torch.where(visible[:, :, None, :, :, None], kspace, 0)
        kspace = crop_or_pad(kspace, self.matrix, (-2, -1))
        mean = self.mean[indices(batch.slots, self.mean.device), None]
        return scale_image(magnitude_image(kspace), batch.padded).sub_(mean).div_(self.sd)

    def __call__(
        self,
        batch: Acquisition,
        images: Float[Tensor, "batch slice t y x"],
        chosen: Bool[Tensor, "batch slice pt py px"],
        lengths: Lengths | None = None,
    ) -> Tokens:
        """Tokens of the `chosen` patches of normalised images."""
        pt, py, px = self.patch
        cells = images.unfold(2, pt, pt).unfold(3, py, py).unfold(4, px, px)
        places = gather(chosen, lengths)
        row, (z, t, y, x) = places.lengths.subject, places.index.unbind(-1)
        place = indices(batch.slots, z.device)[z]
        index = torch.stack([place, t, y, x], dim=-1)
        return Tokens(places.lengths, index, cells[row, z, t, y, x].flatten(1))

    def present(self, batch: Acquisition) -> Bool[Tensor, "batch slice pt py px"]:
        """Patches of which some frame holds data."""
        pt, py, px = self.patch
        present = ~batch.padded.unflatten(2, (-1, pt)).all(-1)
        return present[..., None, None].expand(*present.shape, self.matrix[0] // py, self.matrix[1] // px)

    def zerofilled(
        self, batch: Acquisition, visible: Bool[Tensor, "batch slice t ky"], lengths: Lengths | None = None
    ) -> Tokens:
        """All patches of the images that the `visible` lines alone make, aliased as they are."""
        return self(batch, self.images(batch, visible), self.present(batch), lengths)


class Centre:
    """The temporally shared image at low resolution of every slice and frame, of the lines that may be seen.

    Of its mean over the cycle the population's is taken off; what stands still and what moves are then brought to unit
    variance each, so that the little that moves is not lost beside the rest.

    Args:
        tables: `data.loader.statistics.centre`.
    """

    def __init__(self, model: Model, tables: dict[str, Tensor], device: torch.device):
        self.side = model.centre
        self.mean, self.still, self.moving = (
            tables[f"centre_{name}"].to(device) for name in ("mean", "still", "moving")
        )

    def __call__(
        self, batch: Acquisition, visible: Bool[Tensor, "batch slice t ky"]
    ) -> Float[Tensor, "batch slice t pixel"]:
        image, mean = shared_centre(batch.kspace, visible, batch.padded, self.side)
        slots = torch.tensor(batch.slots, device=image.device)
        still = (mean - self.mean[slots, None]) / self.still
        found: Tensor = (still + (image - mean) / self.moving) * ~batch.padded[..., None]
        return found


def encoder_inputs(model: Model, lines: Tokens, zerofilled: Tokens | None) -> list[Tokens]:
    """Tokens of the k-space encoder, in the order of its kinds of tokens (`model.encoder.line_encoder`)."""
    if zerofilled is None:
        return [lines]
    return [zerofilled] if model.encoder_inputs == "zerofilled" else [lines, zerofilled]
