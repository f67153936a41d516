"""What OCMR's files say of themselves (the files are not here): an importer must make the right arrays of it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from raw_files import complex_array, lines_of, write_ismrmrd, xml_header

from kmtr.data.sources import Options, read

SHARED = Path(os.environ.get("KMTR_SHARED", Path(__file__).parents[2].parent / "shared" / "data"))
METADATA = SHARED / "ocmr_metadata" / "dataset.yaml"

pytestmark = pytest.mark.skipif(
    not METADATA.is_file(), reason="OCMR's metadata (KMTR_SHARED or ../shared/data) is missing"
)


@pytest.mark.parametrize(
    ("file", "view", "undersampled"), [("fs_0001_1_5T", "lax_4ch", False), ("us_0001_3T", "sax", True)]
)
def test_ocmr_headers(tmp_path: Path, file: str, view: str, undersampled: bool) -> None:
    """Files of the described matrices, scanner and protocol, two coils and frames instead of all."""
    described = yaml.safe_load(METADATA.read_text())["ismrmrd"]["selected_fixture_headers"]
    (header,) = (entry for entry in described if entry["path"].endswith(f"{file}.h5"))
    nx, ny, _ = header["encoded_matrix"]
    wanted_nx, wanted_ny, _ = header["reconstruction_matrix"]
    vendor = header["scanner"].split()[0]
    wide, high, thick = header["field_of_view_mm"]
    xml = xml_header(
        (ny, nx),
        oversampling=nx / wanted_nx,
        pixel_mm=(high / ny, wide / nx),
        thickness_mm=thick,
        protocol=header["protocol_name"],
        vendor=vendor,
    )
    kspace = complex_array(np.random.default_rng(0), 1, 2, 2, ny, nx)
    lines = lines_of(
        kspace, (lambda f: f if (f["kspace_encode_step_1"] + f["phase"]) % 9 == 0 else None) if undersampled else None
    )
    path = write_ismrmrd(tmp_path / f"{file}.h5", xml, lines)
    study = read(path)
    assert list(study.views) == [view]
    assert study.vendor == "Siemens"
    assert study.views[view].kspace.shape == (1, 2, 2, wanted_ny, wanted_nx)
    assert study.views[view].spacing_mm == pytest.approx((thick, high / ny, wide / nx))
    assert (study.views[view].sampled is not None) is undersampled
    assert read(path, Options(oversampling="keep")).views[view].kspace.shape[-1] == nx
