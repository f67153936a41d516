"""k-space and images to tokens, in fp32 and outside of the engine (bf16 engines would cast the tables)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from kmtr.config import Data, Model
from kmtr.physics.fourier import magnitude_image
from kmtr.physics.images import scale_image
from kmtr.physics.lines import gauge, static_part


@dataclass(frozen=True)
class Tokens:
    """A padded sequence per subject.

    Attributes:
        values: normalised content of the tokens (zeros where padded).
        index: position of each token in its grid: (slice, t, ky) of lines, (slice, t, y, x) of image patches.
        padded: not a token.
    """

    values: Float[Tensor, "batch token feature"]
    index: Int[Tensor, "batch token axis"]
    padded: Bool[Tensor, "batch token"]

    def __getitem__(self, rows: slice) -> Tokens:
        return Tokens(*(getattr(self, f.name)[rows] for f in fields(self)))


def gather(
    chosen: Bool[Tensor, batch * grid],
) -> tuple[Int[Tensor, "batch token axis"], Bool[Tensor, "batch token"]]:
    """Positions of the chosen cells of a grid, in order, padded to the largest count.

    Returns:
        index of each token on the grid's axes, and which tokens are padding (they point at some cell not chosen).
    """
    grid = chosen.shape[1:]
    flat = chosen.flatten(1)
    count = flat.sum(1)
    length = max(int(count.max()), 1)
    order = torch.argsort((~flat).to(torch.uint8), dim=1, stable=True)[:, :length]
    padded = torch.arange(length, device=flat.device) >= count[:, None]
    index, rest = [], order
    for size in reversed(grid):
        index.append(rest % size)
        rest = rest // size
    return torch.stack(index[::-1], dim=-1), padded


class LineTokenizer:
    """Readout lines as tokens: real and imaginary part of the central kx of the dynamic and the static part of a line.

    Lines are made canonical (physics.lines), the population mean is taken from the static part, both parts are divided
    by SD^power of the population and scaled to unit variance. Everything is estimated from the lines that may be seen.

    Args:
        tables: `data.statistics.Statistics.tensors()`.
    """

    def __init__(self, data: Data, model: Model, tables: dict[str, Tensor], device: torch.device):
        self.data, self.model = data, model
        nx = data.matrix[1]
        width = max(2, 2 * round(nx * model.readout_fraction / 2))
        self.kx = slice(nx // 2 - width // 2, nx // 2 + width // 2)
        self.mean = tables["static_mean"][..., self.kx].to(device)
        self.divisor = {}
        for part in ("static", "dynamic"):
            sd = tables[f"{part}_sd"][..., self.kx].to(device)
            unit = sd.pow(2 - 2 * model.normalisation_power).mean().sqrt().clamp(min=torch.finfo(sd.dtype).tiny)
            self.divisor[part] = sd.pow(model.normalisation_power) * unit

    @staticmethod
    def features(data: Data, model: Model) -> int:
        width = max(2, 2 * round(data.matrix[1] * model.readout_fraction / 2))
        return 2 * width * data.coils * (2 if model.line_parts == "static+dynamic" else 1)

    def __call__(
        self,
        kspace: Complex[Tensor, "batch slice coil t ky kx"],
        known: Bool[Tensor, "batch slice t ky"],
        chosen: Bool[Tensor, "batch slice t ky"],
        visible: Bool[Tensor, "batch slice t ky"] | None = None,
    ) -> Tokens:
        """Tokens of the `chosen` lines.

        Args:
            known: lines that the temporal mean is taken over.
            visible: lines that phase and gain are estimated from; `known` where not given.
        """
        factor = gauge(kspace, known if visible is None else visible)
        central = kspace[..., self.kx]
        static = static_part(central, known)
        index, padded = gather(chosen)
        z, t, ky = index.unbind(-1)
        row = torch.arange(len(kspace), device=kspace.device)[:, None]
        scale = factor[row, z][..., None]
        line, fixed = central[row, z, :, t, ky] / scale, static[row, z, :, ky] / scale
        centred = (fixed - self.mean[z, :, ky]) / self.divisor["static"][z, :, ky]
        if self.model.line_parts == "whole":
            parts = [(line - self.mean[z, :, ky]) / self.divisor["static"][z, :, ky]]
        else:
            parts = [(line - fixed) / self.divisor["dynamic"][z, :, ky], centred]
        values = torch.view_as_real(torch.stack(parts, dim=2)).flatten(2)
        return Tokens(values.masked_fill(padded[..., None], 0.0), index, padded)

    def parts(
        self, values: Float[Tensor, "batch token feature"], index: Int[Tensor, "batch token axis"]
    ) -> tuple[Complex[Tensor, "batch token coil kx"], Complex[Tensor, "batch token coil kx"]]:
        """Static and dynamic part of canonical lines (central kx) from token values: inverse of the normalisation.

        With ``model.line_parts=whole`` all of a line is static and nothing dynamic.
        """
        count = 1 if self.model.line_parts == "whole" else 2
        width = self.kx.stop - self.kx.start
        z, _, ky = index.unbind(-1)
        split = torch.view_as_complex(
            values.float().reshape(*values.shape[:2], count, self.data.coils, width, 2).contiguous()
        )
        fixed = split[:, :, -1] * self.divisor["static"][z, :, ky] + self.mean[z, :, ky]
        return fixed, split[:, :, 0] * self.divisor["dynamic"][z, :, ky] if count == 2 else torch.zeros_like(fixed)

    def fill(
        self,
        kspace: Complex[Tensor, "batch slice coil t ky kx"],
        visible: Bool[Tensor, "batch slice t ky"],
        values: Float[Tensor, "batch token feature"],
        index: Int[Tensor, "batch token axis"],
    ) -> Complex[Tensor, "batch slice coil t ky kx"]:
        """k-space with the visible lines as they are and predicted ones elsewhere (data consistency).

        Where a line was visible in other frames, their mean is its static part and only the dynamic part is predicted.
        """
        seen = visible.any(2)[:, :, None, None, :, None]
        static = static_part(kspace, visible)[:, :, :, None]
        filled = torch.where(seen & (self.model.line_parts != "whole"), static, 0).expand(kspace.shape).clone()
        row = torch.arange(len(kspace), device=kspace.device)[:, None]
        z, t, ky = index.unbind(-1)
        scale = gauge(kspace, visible)[row, z][..., None]
        fixed, moving = self.parts(values, index)
        known = seen[row, z, 0, 0, ky] & (self.model.line_parts != "whole")
        central = filled[..., self.kx]
        central[row, z, :, t, ky] += scale * torch.where(known[..., None], moving, fixed + moving)
        return torch.where(visible[:, :, None, :, :, None], kspace, filled)


class PatchTokenizer:
    """Magnitude images as 3D patches (t, y, x), population mean taken off, scaled by one SD."""

    def __init__(self, data: Data, model: Model, tables: dict[str, Tensor], device: torch.device):
        self.patch = model.patch
        self.mean = tables["image_mean"].to(device)
        self.sd = tables["image_sd"].to(device)

    @staticmethod
    def features(model: Model) -> int:
        pt, py, px = model.patch
        return pt * py * px

    def images(
        self, kspace: Complex[Tensor, "batch slice coil t ky kx"], padded: Bool[Tensor, "batch slice t"]
    ) -> Float[Tensor, "batch slice t y x"]:
        """Normalised magnitude images: unit RMS per subject, then the population's mean and SD taken off."""
        return scale_image(magnitude_image(kspace), padded).sub_(self.mean[:, None]).div_(self.sd)

    def __call__(
        self, images: Float[Tensor, "batch slice t y x"], chosen: Bool[Tensor, "batch slice pt py px"]
    ) -> Tokens:
        """Tokens of the `chosen` patches of normalised images."""
        pt, py, px = self.patch
        cells = images.unfold(2, pt, pt).unfold(3, py, py).unfold(4, px, px)
        index, padded = gather(chosen)
        z, t, y, x = index.unbind(-1)
        row = torch.arange(len(images), device=images.device)[:, None]
        values = cells[row, z, t, y, x].flatten(2)
        return Tokens(values.masked_fill(padded[..., None], 0.0), index, padded)
