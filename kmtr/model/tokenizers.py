"""k-space and images to tokens, in fp32 and outside of the engine (bf16 engines would cast the tables)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from kmtr.config import Data, Model
from kmtr.model.packing import Lengths, Places, gather
from kmtr.physics.fourier import centred, crop_or_pad, magnitude_image
from kmtr.physics.images import scale_image
from kmtr.physics.lines import gauge, readout, readout_inverse, static_part

LINE_TABLES = ("static_mean", "static_sd", "dynamic_sd")


@runtime_checkable
class Acquisition(Protocol):
    """What the tokenizers read of a `data.batch.Batch`; see there."""

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

    Lines are made canonical (physics.lines), the population mean is taken from the static part, both parts are divided
    by SD^power of the population and scaled to unit variance. Everything is estimated from the lines that may be seen.

    Args:
        tables: `data.statistics.Statistics.tensors()`.
    """

    def __init__(self, data: Data, model: Model, tables: dict[str, Tensor], device: torch.device):
        self.data, self.model = data, model
        nx = data.matrix[1]
        self.samples = model.readout_samples(nx)
        self.kx = slice(nx // 2 - self.samples // 2, nx // 2 + self.samples // 2)
        self.hybrid = model.readout == "hybrid"
        kept = {name: crop_or_pad(tables[name], (self.samples,), (-1,)) for name in LINE_TABLES}
        self.mean = kept["static_mean"].to(device)
        self.divisor = {}
        for part in ("static", "dynamic"):
            sd = kept[f"{part}_sd"].to(device)
            unit = sd.pow(2 - 2 * model.normalisation_power).mean().sqrt().clamp(min=torch.finfo(sd.dtype).tiny)
            self.divisor[part] = sd.pow(model.normalisation_power) * unit

    @staticmethod
    def features(data: Data, model: Model) -> int:
        parts = 2 if model.line_parts == "static+dynamic" else 1
        return 2 * parts * model.readout_samples(data.matrix[1]) * data.coils

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
            visible: lines that phase and gain are estimated from; `known` where not given.
            lengths: of `chosen`; see `packing.gather`.
        """
        kspace = batch.kspace
        factor = gauge(kspace, known if visible is None else visible)
        missing, height = self.data.coils - kspace.shape[2], kspace.shape[4]
        central = crop_or_pad(kspace, (min(self.samples, kspace.shape[5]),), (-1,))
        static = static_part(central, known)
        places = gather(chosen, lengths)
        row, (z, t, ky) = places.lengths.subject, places.index.unbind(-1)
        scale = factor[row, z][..., None]
        line, fixed = (
            readout(nn.functional.pad(part / scale, (0, 0, 0, missing)), self.samples, self.hybrid)
            for part in (central[row, z, :, t, ky], static[row, z, :, ky])
        )
        place = torch.tensor(batch.slots, device=kspace.device)[z]
        ky = ky + self.data.matrix[0] // 2 - height // 2
        mean, divisor = self.mean[place, :, ky], {name: table[place, :, ky] for name, table in self.divisor.items()}
        if self.model.line_parts == "whole":
            parts = [(line - mean) / divisor["static"]]
        else:
            parts = [(line - fixed) / divisor["dynamic"], (fixed - mean) / divisor["static"]]
        values = torch.stack(parts, dim=1)
        blank = None
        if not self._fills(batch):
            absent = self._absent(batch.extent[row, z])
            values = values.masked_fill(absent[:, None], 0.0)
            blank = absent[:, None, :, :, None].expand(*values.shape, 2).flatten(1)
        index = torch.stack([place, t, ky], dim=-1)
        return Tokens(places.lengths, index, torch.view_as_real(values).flatten(1), blank)

    def _absent(self, extent: Int[Tensor, "token 3"]) -> Bool[Tensor, "token coil readout"]:
        """What of a full token its slice has no data for: coils and, along kx, what a smaller matrix lacks."""
        absent = torch.arange(self.data.coils, device=extent.device) >= extent[..., :1]
        if self.hybrid:
            return absent[..., None].expand(*absent.shape, self.samples)
        return absent[..., None] | ~centred(extent[..., 2], self.data.matrix[1])[..., None, self.kx]

    def _fills(self, batch: Acquisition) -> bool:
        """Whether all subjects have the configuration's coils and all of the readout that enters a token."""
        full = self.kx.stop - self.kx.start
        return batch.same and batch.kspace.shape[2] == self.data.coils and batch.kspace.shape[5] >= full

    def parts(
        self, values: Float[Tensor, "token feature"], index: Int[Tensor, "token axis"]
    ) -> tuple[Complex[Tensor, "token coil kx"], Complex[Tensor, "token coil kx"]]:
        """Static and dynamic part of canonical lines (central kx) from token values: inverse of the normalisation.

        With ``model.line_parts=whole`` all of a line is static and nothing dynamic.
        """
        count = 1 if self.model.line_parts == "whole" else 2
        z, _, ky = index.unbind(-1)
        split = torch.view_as_complex(values.float().reshape(-1, count, self.data.coils, self.samples, 2).contiguous())
        fixed = split[:, -1] * self.divisor["static"][z, :, ky] + self.mean[z, :, ky]
        moving = split[:, 0] * self.divisor["dynamic"][z, :, ky] if count == 2 else torch.zeros_like(fixed)
        return readout_inverse(fixed, self.hybrid), readout_inverse(moving, self.hybrid)

    def fill(
        self,
        kspace: Complex[Tensor, "batch slice coil t ky kx"],
        visible: Bool[Tensor, "batch slice t ky"],
        values: Float[Tensor, "token feature"],
        places: Places,
    ) -> Complex[Tensor, "batch slice coil t ky kx"]:
        """k-space with the visible lines as they are and predicted ones elsewhere (data consistency).

        Where a line was visible in other frames, their mean is its static part and only the dynamic part is predicted.
        """
        seen = visible.any(2)[:, :, None, None, :, None]
        static = static_part(kspace, visible)[:, :, :, None]
        filled = torch.where(seen & (self.model.line_parts != "whole"), static, 0).expand(kspace.shape).clone()
        row, (z, t, ky) = places.lengths.subject, places.index.unbind(-1)
        scale = gauge(kspace, visible)[row, z][..., None]
        fixed, moving = self.parts(values, places.index)
        known = seen[row, z, 0, 0, ky] & (self.model.line_parts != "whole")
        central = filled[..., self.kx]
        central[row, z, :, t, ky] += scale * torch.where(known[..., None], moving, fixed + moving)
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

    def images(self, batch: Acquisition) -> Float[Tensor, "batch slice t y x"]:
        """Normalised magnitude images: unit RMS per subject, then the population's mean and SD taken off.

        All have the configuration's full matrix: k-space of a smaller one is filled up with zeros, which keeps the
        field of view and interpolates.
        """
        kspace = crop_or_pad(batch.kspace, self.matrix, (-2, -1))
        mean = self.mean[torch.tensor(batch.slots, device=self.mean.device), None]
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
        place = torch.tensor(batch.slots, device=z.device)[z]
        index = torch.stack([place, t, y, x], dim=-1)
        return Tokens(places.lengths, index, cells[row, z, t, y, x].flatten(1))
