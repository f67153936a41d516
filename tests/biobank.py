"""Folders as `ukbb_cardiac` makes them of UK Biobank's archives, of simulated hearts: a subject each, and a table of
labels beside.
"""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from cohort import simulated

from kmtr.config import RunConfig
from kmtr.data.sources.anatomy import RV
from kmtr.data.sources.cine import WANTED
from kmtr.physics.fourier import ifft2c
from kmtr.types import Study, View

STEMS = {"sax": "sa", "lax_2ch": "la_2ch", "lax_3ch": "la_3ch", "lax_4ch": "la_4ch"}
CONTOURS = {"sax": "label_sa", "lax_4ch": "seg4_la_4ch"}
"""View -> name of its contours, whose values are SEGMENTATION_CLASSES."""
FRAME_TIME_S = 0.04
"""Between the frames of the files, in s: that of the few simulated ones would be none of a scanner."""
FIRST = 1000001
"""Number of subject 0."""


def magnitude(view: View) -> np.ndarray:
    """float32 ``slice t y x`` of one coil."""
    return np.abs(ifft2c(view.kspace))[:, 0].astype(np.float32)


def contours(name: str, view: View) -> np.ndarray | None:
    """uint8 ``slice t y x``, as the view's file has them: a short axis without atria."""
    if name not in CONTOURS or view.segmentation is None:
        return None
    return np.where(view.segmentation > RV, 0, view.segmentation) if name == "sax" else view.segmentation


def stored(array: np.ndarray) -> np.ndarray:
    """``slice t y x`` as the files have it: ``x y slice t``, x from the other end."""
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1)[::-1])


def affine_of(name: str, view: View) -> np.ndarray:
    """Right-anterior-superior place of the voxels of `stored`."""
    assert view.spacing_mm is not None
    z, y, x = WANTED[name]
    spacing = np.array(view.spacing_mm[::-1])
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([-x, y, z], 1) * spacing
    matrix[:3, 3] = 20.0 + x * spacing[0] * (view.kspace.shape[-1] - 1)
    return matrix


def save(path: Path, array: np.ndarray, name: str, view: View) -> None:
    image = nibabel.Nifti1Image(stored(array), affine_of(name, view))
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_zooms((*image.header.get_zooms()[:3], FRAME_TIME_S))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


def write_folder(folder: Path, config: RunConfig, count: int) -> list[Study]:
    """Write ``<number>/sa.nii.gz``, ... and ``labels.csv`` (eid, EDV, EF, dcm) of so many simulated subjects, which are
    returned as they were before.
    """
    studies = [simulated(i, config) for i in range(count)]
    lines = ["eid,edv,lvef_pct,dilated"]
    for number, study in enumerate(studies, FIRST):
        for name, view in study.views.items():
            image = magnitude(view)
            save(
                folder / f"{number}" / f"{STEMS[name]}.nii.gz",
                (1000 * image / image.max()).astype(np.int16),
                name,
                view,
            )
            if (drawn := contours(name, view)) is not None:
                save(folder / f"{number}" / f"{CONTOURS[name]}.nii.gz", drawn.astype(np.uint8), name, view)
        edv, ef = study.labels["lvedv_ml"], study.labels["lvef_pct"]
        lines.append(f"{number},{edv:.1f},{ef:.1f},{number % 2}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return studies
