"""What a DICOM header says that names and order do not: views, cines, time, brightness, slices that belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydicom")
from test_dicom import FOUR_CHAMBERS, FRAMES, ROWS, image, magnitude, pixels, short_axis, stack, write

from kmtr.data.sources import Options, read
from kmtr.types import InputError


def named(names: list[str], **last: Any) -> list[Any]:
    """A short axis whose slices are series of their own; `last` changes the header of the one at the end."""
    found = []
    for z, name in enumerate(names):
        header: dict[str, Any] = {"SeriesDescription": name, "SeriesInstanceUID": f"1.2.3.{z}", "SeriesNumber": 10 + z}
        found += [image(z, t, **header, **(last if z == len(names) - 1 else {})) for t in range(FRAMES)]
    return found


@pytest.mark.parametrize("bits", [12, 16])
def test_monochrome1_is_turned_to_bright_blood(tmp_path: Path, bits: int) -> None:
    datasets = stack(2, PhotometricInterpretation="MONOCHROME1", BitsStored=bits, HighBit=bits - 1)
    for dataset in datasets:
        stored = np.frombuffer(dataset.PixelData, np.uint16)
        dataset.PixelData = (2**bits - 1 - stored.astype(int)).astype(np.uint16).tobytes()
    np.testing.assert_allclose(magnitude(read(write(tmp_path, datasets))), short_axis(2), atol=2e-2)


@pytest.mark.parametrize("names", [["base", "mid", "mid", "apex"], ["a", "b", "c", "d"], ["sax"] * 4])
def test_slices_of_other_names_join_their_stack(tmp_path: Path, names: list[str]) -> None:
    study = read(write(tmp_path, named([f"SAX {name}" for name in names])))
    np.testing.assert_allclose(magnitude(study), short_axis(4), atol=2e-2)


def test_slices_of_another_spacing_or_matrix_refuse_their_stack(tmp_path: Path) -> None:
    larger = {"Rows": ROWS + 2, "PixelData": pixels(0, 0, ROWS + 2).tobytes()}
    for n, last in enumerate(({"PixelSpacing": ["1.6", "1.25"]}, larger)):
        with pytest.raises(InputError, match="one size and pixel spacing"):
            read(write(tmp_path / str(n), named(["sax"] * 4, **last)))


def test_a_second_scan_of_the_same_slices_is_left_out_and_counted(tmp_path: Path) -> None:
    again = stack(1, SeriesDescription="sax other", SeriesNumber=9, SeriesInstanceUID="1.9")
    study = read(write(tmp_path, [*stack(3), *again]))
    np.testing.assert_allclose(magnitude(study), short_axis(3), atol=2e-2)
    assert study.notes == (f"left out: {FRAMES} images of another scan of the sax view",)


@pytest.mark.parametrize(
    ("axes", "name", "view"),
    [
        (None, "sax stack from 4ch", "sax"),
        (None, "cine sa planned on 2ch and 4ch", "sax"),
        (None, "cine", "sax"),
        (FOUR_CHAMBERS, "4ch", "lax_4ch"),
        (FOUR_CHAMBERS, "4ch from sax", "lax_4ch"),
        (FOUR_CHAMBERS, "2ch from 4ch", None),
        (None, "4ch", None),
    ],
)
def test_orientation_goes_before_words(tmp_path: Path, axes: Any, name: str, view: str | None) -> None:
    turn = {} if axes is None else {"axes": axes}
    write(tmp_path, [image(0, t, **turn, SeriesDescription=name) for t in range(FRAMES)])
    if view:
        assert list(read(tmp_path).views) == [view]
    else:
        with pytest.raises(InputError, match=f"left out: {FRAMES} images whose name"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("change", "read_as_cine"),
    [
        (lambda t: {"TriggerTime": str(820 * t)}, False),
        (lambda t: {"TriggerTime": "300", "AcquisitionTime": f"1200{t:02d}.5"}, False),
        (lambda t: {"InversionTime": str(100 + 200 * t)}, False),
        (lambda t: {"ImageType": ["DERIVED", "PRIMARY", "T1 MAP"]}, False),
        (lambda t: {"SequenceName": "*fl2d1_v150in"}, False),
        (lambda t: {"AcquisitionTime": f"1200{t:02d}.5"}, True),  # of reconstruction: the trigger times tell better
        (lambda t: {"TriggerTime": str(90 * t)}, True),
        (lambda t: {"TriggerTime": str(40_000 * t)}, True),  # microseconds
        (lambda t: {"ImageType": ["DERIVED", "SECONDARY", "M"]}, True),
    ],
)
def test_series_that_are_no_cine(tmp_path: Path, change: Any, read_as_cine: bool) -> None:
    write(tmp_path, [image(z, t, **change(t)) for z in range(2) for t in range(FRAMES)])
    if read_as_cine:
        np.testing.assert_allclose(magnitude(read(tmp_path)), short_axis(2), atol=2e-2)
    else:
        with pytest.raises(InputError, match=f"left out: {2 * FRAMES} images of"):
            read(tmp_path)


def test_a_file_without_meta_header_is_told_so(tmp_path: Path) -> None:
    path = next(write(tmp_path, stack(1)).iterdir())
    bare = path.with_name("1234567")
    bare.write_bytes(b"\x08\0\x05\0CS\x0a\0ISO_IR 100")
    with pytest.raises(InputError, match=r"cannot be read: it has no meta header .* DCMTK"):
        read(tmp_path, format="dicom")


def test_an_empty_file_is_fetched_again(tmp_path: Path) -> None:
    path = next(write(tmp_path, stack(1)).iterdir())
    path.write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read: it is empty; fetch it again"):
        read(tmp_path, format="dicom")


def test_a_cine_that_no_shard_can_hold_is_refused_before_its_pixels(tmp_path: Path) -> None:
    datasets = [image(0, t, PixelData=b"") for t in range(FRAMES)]
    with pytest.raises(InputError, match=r"less than 2 GiB .*shards\.dtype=float16"):
        read(write(tmp_path, datasets), Options(matrix=(8192, 5000), dtype="float32"))
