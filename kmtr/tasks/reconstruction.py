"""Image reconstruction: the fully sampled magnitude image, from a system's tokens, or as a system makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from kmtr.data.loader.batch import Batch
from kmtr.inputs import full_image, known_image, known_peak
from kmtr.metrics.dense import reconstruction_scores
from kmtr.physics.fourier import crop_or_pad, fft2c, ifft2c
from kmtr.systems import Imaging, system
from kmtr.tasks import priors
from kmtr.tasks.base import LOSS, SCORE, Encode, Given
from kmtr.tasks.dense import Asked, Chosen, Dense
from kmtr.tasks.losses import absolute_and_structural
from kmtr.tasks.views import of_subjects, views_of
from kmtr.types import InputError


class Reconstruction(Dense):
    """Magnitude image (root sum of squares of the coils); the loss is L1 + (1 - SSIM), over what the training subjects'
    mean image has of it.

    Begins at the temporally shared image where queries see it, else at the mean image. Inside, 1 is the RMS of the
    subject's temporally shared image, which acquired lines tell; predictions are in the source's numbers. A system that
    reconstructs by itself (`systems.Imaging`) is taken as it is, without a head.
    """

    name = label = "reconstruction"
    outputs = 1
    needs = "images"

    @property
    def looks(self) -> bool:
        return True

    @property
    def imaging(self) -> bool:
        """True where the system reconstructs by itself."""
        return isinstance(system(self.config.task.system), Imaging)

    @property
    def shows(self) -> bool:
        return super().shows and not self.imaging

    def check(self) -> None:
        if self.imaging:
            if self.config.task.frozen:
                raise InputError(
                    f"task.frozen: expected false, since {self.config.task.system} has no head that could learn"
                )
            return
        super().check()
        if self.mapped:
            raise InputError(
                f"task.system: expected one that offers tokens or an image for {self.name}, got "
                f"{self.config.task.system}, which offers maps"
            )

    def head(self) -> nn.Module:
        return nn.Identity() if self.imaging else super().head()

    def fit(self, batches: Callable[[], Iterable[Batch]], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``image_constant``, the loss of the mean image."""
        own = {"image_constant": priors.image_constant(self.config.data, batches(), tables["image_mean"])}
        return super().fit(batches, tables) | own

    def teaching(self, batch: Batch) -> Bool[Tensor, "batch slice t"]:
        return batch.complete

    def extra(self, batch: Batch, given: Given, chosen: Chosen) -> Mapping[str, Any]:
        assert chosen.seen is not None
        seen, place, matrix = chosen.seen, chosen.place, self.config.data.matrix
        mean = given.tables["image_mean"][chosen.cells.index[:, 0]]
        start = seen.image[place] if self.shows else mean
        truth = full_image(batch, matrix) / seen.unit[:, None, None, None, None]
        extra = {"start": start, "scale": given.tables["image_sd"], "unit": seen.unit[place[0]]}
        extra |= {"truth": truth[place], "peak": known_peak(truth, batch), "constant": given.tables["image_constant"]}
        if self.config.task.data_consistency and not self.imaging:
            row, z, t = place
            sampled = crop_or_pad(batch.sampled, matrix[:1], (-1,))
            extra |= {"kspace": seen.kspace[row, z, :, t], "sampled": sampled[place]}
        return extra

    def image(self, encode: Encode, head: Any, asked: Asked) -> Float[Tensor, "cell y x"]:
        """In units of the temporally shared image's RMS."""
        extra = asked.extra
        if self.imaging:
            row, z, t = asked.place
            return magnitude(encode(asked.seen).kspace[row, z, :, t])
        found = extra["start"] + extra["scale"] * self.raw(encode, head, asked)[:, 0]
        return consistent(found, extra["kspace"], extra["sampled"]) if "kspace" in extra else found

    def forward(self, encode: Encode, head: Any, asked: Asked) -> dict[str, Tensor]:
        extra, counts = asked.extra, asked.cells.lengths.counts
        loss = absolute_and_structural(self.image(encode, head, asked), extra["truth"], extra["peak"], counts)
        return {LOSS: loss / extra["constant"]}

    def predict(self, encode: Encode, head: Any, asked: Asked) -> dict[str, Tensor]:
        """``image`` float32 ``batch slice t y x``, in the source's numbers, NaN where nothing is there."""
        found = self.image(encode, head, asked).clamp(min=0) * asked.extra["unit"][:, None, None]
        return {"image": asked.on_grid(found, torch.nan)}

    def judge(self, batch: Batch, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``psnr_db``, ``ssim``, ``nmse`` of each subject, over the field of view; NaN where the scanner undersampled a
        view.
        """
        truth = known_image(batch, self.config.data.matrix)
        scores = [reconstruction_scores(views) for views in views_of(batch, self.config.data, truth, outputs["image"])]
        return of_subjects(scores, batch.key.device)

    def counts_as(self, target: str) -> str:
        return "mean" if target == "ssim" else ""

    def score(
        self, truth: Mapping[str, np.ndarray], predicted: Mapping[str, np.ndarray], reference: Mapping[str, float]
    ) -> dict[str, float]:
        """Mean PSNR, SSIM and NMSE; SSIM is what counts."""
        means = {n: float(np.nanmean(v)) for n, v in predicted.items() if np.isfinite(v).any()}
        return means | {SCORE: means.get("ssim", float("nan"))}


def magnitude(kspace: Complex[Tensor, "cell coil ky kx"]) -> Float[Tensor, "cell y x"]:
    """Root-sum-of-squares image with a gradient where it is 0, and of no cells at all."""
    if not len(kspace):  # no transform takes nothing; all weights get a gradient, as on the other workers
        return kspace.real.sum(1)
    energy = torch.view_as_real(ifft2c(kspace)).square().sum((1, -1))
    return energy.clamp(min=torch.finfo(energy.dtype).tiny).sqrt()


def consistent(
    image: Float[Tensor, "cell y x"],
    kspace: Complex[Tensor, "cell coil ky kx"],
    sampled: Bool[Tensor, "cell ky"],
) -> Float[Tensor, "cell y x"]:
    """The image with the acquired lines put back.

    Phase and coil sensitivities are taken from the image of `kspace` itself: every coil's part of it keeps its share of
    the root sum of squares.

    Args:
        kspace: acquired lines, and an estimate of the others.
    """
    if not len(image):
        return image
    coils = ifft2c(kspace)
    total = coils.abs().square().sum(1, keepdim=True).sqrt()
    share = coils / total.clamp(min=torch.finfo(torch.float32).tiny)
    filled = torch.where(sampled[:, None, :, None], kspace, fft2c(share * image[:, None]))
    return magnitude(filled)
