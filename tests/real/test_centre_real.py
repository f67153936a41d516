"""Where the energy of real k-space lies, and of real images in its place; skipped where the samples are missing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from raw_files import lines_of, write_ismrmrd, xml_header

from kmtr.data.sources import Options, read
from kmtr.physics.centre import problem
from kmtr.physics.fourier import ifft2c, ifftc
from kmtr.types import View

SHARED = Path(os.environ.get("KMTR_SHARED", Path(__file__).parents[2].parent / "shared" / "data"))

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="real samples (KMTR_SHARED or ../shared/data) are missing")

RAW = ("cmrxrecon2024/cine_sax.mat", "cmrxrecon2025/underkslice_ktGaussian8.mat")


def scan(file: str) -> View:
    if file in RAW:
        return read(SHARED / file).views["sax"]
    view = read(SHARED / "sunnybrook" / file / f"{file}_4d.nii.gz").views["sax"]
    return View(np.ascontiguousarray(view.kspace[::4, :, ::7]))


@pytest.fixture(scope="module", params=[*RAW, "SC-HF-I-1", "SC-HF-I-4"])
def view(request: pytest.FixtureRequest) -> View:
    return scan(request.param)


def test_real_k_space_is_k_space(view: View) -> None:
    k, sampled = view.kspace, view.sampled
    assert problem(k, sampled) == ""
    assert problem(k[:1, :1, :1], None if sampled is None else sampled[:1, :1]) == ""
    echo = k.copy()
    echo[..., : k.shape[-1] // 3] = 0
    assert problem(echo, sampled) == ""
    lines = np.ones((k.shape[0], k.shape[2], k.shape[3]), bool) if sampled is None else sampled.copy()
    lines[..., : k.shape[-2] * 3 // 8] = False
    assert problem(k * lines[:, None, ..., None], lines) == ""


def test_real_images_and_shifted_k_space_are_none(view: View) -> None:
    k, sampled = view.kspace, view.sampled
    assert "images" in problem(ifft2c(k))
    assert "images" in problem((np.abs(ifft2c(k)) * np.exp(1j)).astype(np.complex64))
    assert "transformed along kx" in problem(ifftc(k, (-1,)), sampled)
    assert "transformed along ky" in problem(ifftc(k, (-2,)))
    assert "around sample" in problem(np.fft.ifftshift(k, (-1,)), sampled)
    assert "around sample" in problem(np.roll(k, k.shape[-1] // 12, -1), sampled)
    if sampled is None:
        assert "around line" in problem(np.fft.ifftshift(k, (-2,)))
        assert "around line" in problem(np.roll(k, k.shape[-2] // 12, -2))


@pytest.mark.parametrize(("first_line", "first_sample"), [(0, 0), (60, 0), (0, 128), (31, 70)])
@pytest.mark.parametrize("right", [True, False])
def test_a_real_slice_as_a_scanner_would_store_it(
    tmp_path: Path, first_line: int, first_sample: int, right: bool
) -> None:
    """Partial Fourier and an asymmetric echo of real k-space; the header knows the centres, or halves what is there."""
    kspace = scan(RAW[0]).kspace
    ny, nx = kspace.shape[-2:]
    centre = ny // 2 - first_line if right else (ny - first_line) // 2
    sample = nx // 2 - first_sample if right else (nx - first_sample) // 2

    def change(fields: dict) -> dict | None:
        line = fields["kspace_encode_step_1"] - first_line
        return fields | {"kspace_encode_step_1": line, "center_sample": sample} if line >= 0 else None

    xml = xml_header((ny, nx), oversampling=2.0, centre=centre)
    path = write_ismrmrd(tmp_path / "a.h5", xml, lines_of(kspace[..., first_sample:], change))
    study = read(path, Options(oversampling="keep"))
    kspace[..., :first_line, :] = kspace[..., :first_sample] = 0
    np.testing.assert_array_equal(study.views["sax"].kspace, kspace)
    assert len(study.notes) == (0 if right else (first_line > 0) + (first_sample > 0))
