"""ISMRMRD files whose header and energy disagree: read where the energy lies, or refused in a line; and those that are
only unusual, which are read as the header says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import ismrmrd
import numpy as np
import pytest
from ismrmrd import xsd
from raw_files import acquisition, complex_array, lines_of, write_ismrmrd, xml_header

from kmtr.data.sources import Options, discover, read, unused
from kmtr.physics.fourier import crop_or_pad, fftc, ifftc
from kmtr.simulation import phantom
from kmtr.types import InputError, Study

NY, NX = 48, 80
Fields = dict[str, Any]


@pytest.fixture(scope="module")
def kspace() -> np.ndarray:
    """``slice coil t ky kx`` of a simulated heart, readout oversampled by two: 48 lines of 80 samples."""
    study = phantom.simulate(
        1, seed=0, views=("sax",), sax_slices=2, frames=3, matrix=(NY, NX // 2), snr_db=20.0, coils=3, oversampling=2.0
    )
    return study.views["sax"].kspace


def header(edit: Callable[[Any], None] | None = None, matrix: tuple[int, int] = (NY, NX), **known: Any) -> str:
    """The XML; `edit` may change its encoding."""
    xml = xml_header(matrix, **({"oversampling": 2.0} | known))
    if edit is None:
        return xml
    parsed = xsd.CreateFromDocument(xml)
    edit(parsed)
    return xsd.ToXML(parsed)


def limits(minimum: int, maximum: int, center: int) -> Callable[[Any], None]:
    def edit(parsed: Any) -> None:
        parsed.encoding[0].encodingLimits.kspace_encoding_step_1 = xsd.limitType(
            minimum=minimum, maximum=maximum, center=center
        )

    return edit


def no_limits(parsed: Any) -> None:
    parsed.encoding[0].encodingLimits.kspace_encoding_step_1 = None


def counted_from(first: int) -> Callable[[Fields], Fields | None]:
    """The scanner counts lines from the first that it measures."""

    def change(fields: Fields) -> Fields | None:
        line = fields["kspace_encode_step_1"] - first
        return fields | {"kspace_encode_step_1": line} if line >= 0 else None

    return change


def study(path: Path, xml: str, lines: Iterator[ismrmrd.Acquisition], **options: Any) -> Study:
    return read(write_ismrmrd(path / "a.h5", xml, lines), Options(**({"oversampling": "keep"} | options)))


# lines


@pytest.mark.parametrize("first", [6, 12, 18])  # 7/8, 6/8, 5/8
@pytest.mark.parametrize("told", ["right", "protocol", "half of what is there", "nothing"])
def test_partial_fourier_is_read_by_its_energy(tmp_path: Path, kspace, first: int, told: str) -> None:
    """siemens_to_ismrmrd says half of the protocol's lines; others half of those that are there, or nothing."""
    last = NY - 1 - first
    edit = {
        "right": limits(0, last, NY // 2 - first),
        "protocol": limits(0, last, NY // 2),
        "half of what is there": limits(0, last, (last + 1) // 2),
        "nothing": no_limits,
    }[told]
    got = study(tmp_path, header(edit), lines_of(kspace, counted_from(first)))
    view = got.views["sax"]
    np.testing.assert_array_equal(view.kspace[..., first:, :], kspace[..., first:, :])
    assert not view.kspace[..., :first, :].any()
    assert view.sampled[..., first:].all()
    assert not view.sampled[..., :first].any()
    assert bool(got.notes) is (told != "right")


def test_the_other_half_of_partial_fourier(tmp_path: Path, kspace) -> None:
    """The last lines are left out, and the header's centre is that of what is left."""
    lines = lines_of(kspace, lambda f: f if f["kspace_encode_step_1"] < 36 else None)
    got = study(tmp_path, header(limits(0, 35, 18)), lines)
    np.testing.assert_array_equal(got.views["sax"].kspace[..., :36, :], kspace[..., :36, :])
    assert not got.views["sax"].kspace[..., 36:, :].any()
    assert "line 18 of 0 to 35" in got.notes[0]


def test_partial_fourier_in_a_matrix_filled_with_zeros(tmp_path: Path, kspace) -> None:
    """The header's matrix has the length of the Fourier transform, its centre is half of the protocol's lines."""
    xml = header(limits(0, 35, 24), (60, NX))
    got = study(tmp_path, xml, lines_of(kspace, counted_from(12)))
    np.testing.assert_array_equal(got.views["sax"].kspace[..., 12:, :], kspace[..., 12:, :])
    assert got.views["sax"].spacing_mm == pytest.approx((10.0, 1.5 * 60 / 48, 1.25))


@pytest.mark.parametrize("edit", [limits(0, NY - 1, NY // 2), limits(0, 59, 24), no_limits])
def test_lines_that_only_zeros_surround_are_a_matrix_of_their_own(tmp_path: Path, kspace, edit) -> None:
    """A phase resolution below 100 %: OCMR's files, whose own reader takes as many lines as the limits say."""
    got = study(tmp_path, header(edit, (60, NX)), lines_of(kspace))
    np.testing.assert_array_equal(got.views["sax"].kspace, kspace)
    assert got.views["sax"].sampled is None
    assert got.views["sax"].spacing_mm == pytest.approx((10.0, 1.5 * 60 / 48, 1.25))
    assert got.notes[-1] == "sax: 48 lines were encoded of the header's 60: read as they are, without zeros"
    assert len(got.notes) == (2 if edit is no_limits else 1)


def test_undersampling_keeps_the_lines_that_the_limits_say(tmp_path: Path, kspace) -> None:
    """The outermost lines are sampled in no frame, and still belong to the matrix."""

    def change(f: Fields) -> Fields | None:
        line = f["kspace_encode_step_1"]
        return f if 4 <= line < 44 and (line % 3 == f["phase"] or 22 <= line < 27) else None

    got = study(tmp_path, header(), lines_of(kspace, change))
    assert got.views["sax"].kspace.shape == kspace.shape
    assert 0.3 < got.views["sax"].sampled.mean() < 0.4
    assert got.notes == ()


def test_frames_without_a_central_line_are_read_and_counted(tmp_path: Path, kspace) -> None:
    def change(f: Fields) -> Fields | None:
        return None if (f["slice"], f["phase"]) == (1, 2) and abs(f["kspace_encode_step_1"] - 24) < 6 else f

    got = study(tmp_path, header(), lines_of(kspace, change))
    assert got.notes == ("sax: 1 of 6 frames have no line within 2 of the centre of k-space",)


def test_a_spike_moves_no_centre(tmp_path: Path, kspace) -> None:
    spoilt = kspace.copy()
    spoilt[0, :, 1, 3, 7] = 30 * np.abs(kspace).max()
    got = study(tmp_path, header(), lines_of(spoilt))
    np.testing.assert_array_equal(got.views["sax"].kspace, spoilt)
    assert got.notes == ()


@pytest.mark.parametrize("shift", [9, -11])
def test_lines_that_no_scan_explains_are_refused(tmp_path: Path, kspace, shift: int) -> None:
    with pytest.raises(InputError, match=r"the header's central line 24, got it around (\d+),") as caught:
        study(tmp_path, header(), lines_of(np.roll(kspace, shift, -2)))
    line = str(caught.value)
    assert "\n" not in line
    assert abs(int(line.split("got it around ")[1].split(",")[0]) - 24 - shift) <= 1


# samples


@pytest.mark.parametrize("first", [10, 20, 30])
@pytest.mark.parametrize("told", ["right", "half", "zero"])
def test_asymmetric_echoes_are_read_by_their_energy(tmp_path: Path, kspace, first: int, told: str) -> None:
    centre = {"right": NX // 2 - first, "half": (NX - first) // 2, "zero": 0}[told]
    lines = lines_of(kspace[..., first:], lambda f: f | {"center_sample": centre})
    got = study(tmp_path, header(), lines)
    np.testing.assert_array_equal(got.views["sax"].kspace[..., first:], kspace[..., first:])
    assert not got.views["sax"].kspace[..., :first].any()
    assert got.views["sax"].sampled is None
    assert bool(got.notes) is (told != "right")


def test_echoes_that_end_early(tmp_path: Path, kspace) -> None:
    """The last 16 samples were not measured; what a converter calls the centre is half of the rest."""
    for centre in (40, 32):
        lines = lines_of(kspace[..., :64], lambda f, c=centre: f | {"center_sample": c})
        got = study(tmp_path, header(), lines)
        np.testing.assert_array_equal(got.views["sax"].kspace[..., :64], kspace[..., :64])


@pytest.mark.parametrize("told", [NX // 2, 0, NX // 2 - 1, NX // 4, NX])
def test_complete_readouts_lie_in_one_way_only(tmp_path: Path, kspace, told: int) -> None:
    got = study(tmp_path, header(), lines_of(kspace, lambda f: f | {"center_sample": told}))
    np.testing.assert_array_equal(got.views["sax"].kspace, kspace)


def test_samples_to_discard_beyond_the_matrix(tmp_path: Path, kspace) -> None:
    """Gradient ramps: four samples before and two after the encoded readout, however loud."""
    wide = np.pad(kspace, [(0, 0)] * 4 + [(4, 2)], constant_values=10 * np.abs(kspace).max())
    fields = {"discard_pre": 4, "discard_post": 2, "center_sample": NX // 2 + 4}
    got = study(tmp_path, header(), lines_of(wide, lambda f: f | fields))
    np.testing.assert_array_equal(got.views["sax"].kspace, kspace)
    assert got.notes == ()


@pytest.mark.parametrize("told", [20, 40, 0, 39])
@pytest.mark.parametrize("oversampling", ["keep", "remove"])
def test_oversampling_that_was_removed_before(tmp_path: Path, kspace, told: int, oversampling: str) -> None:
    """The acquisitions have 40 samples, the header's encoded space still has 80 over twice the field of view."""
    small = fftc(crop_or_pad(ifftc(kspace, (-1,)), (40,), (-1,)), (-1,)).astype(np.complex64)
    got = study(tmp_path, header(), lines_of(small, lambda f: f | {"center_sample": told}), oversampling=oversampling)
    np.testing.assert_array_equal(got.views["sax"].kspace, small)
    assert got.views["sax"].spacing_mm == pytest.approx((10.0, 1.5, 1.25))
    assert "oversampling was removed before" in got.notes[0]


def test_oversampling_that_is_not_there_is_not_removed(tmp_path: Path, kspace) -> None:
    """The encoded matrix has been corrected, its field of view has not: half of the body would be cut off."""
    hybrid = crop_or_pad(ifftc(kspace, (-1,)), (40,), (-1,))
    hybrid /= np.sqrt((np.abs(hybrid) ** 2).mean((0, 1, 2, 3)))  # a body as bright at its sides as in the middle
    hybrid[..., [0, 1, 2, -1]] = 0
    small = fftc(hybrid, (-1,)).astype(np.complex64)
    with pytest.raises(InputError, match=r"oversampled readouts, 40 samples for 20 pixels.*oversampling=keep"):
        study(tmp_path, header(matrix=(NY, 40)), lines_of(small), oversampling="remove")
    kept = study(tmp_path, header(matrix=(NY, 40)), lines_of(small))
    np.testing.assert_array_equal(kept.views["sax"].kspace, small)


@pytest.mark.parametrize("matrix", [(88, 150), (NY, 150), (60, 104)])
def test_an_encoded_matrix_that_was_not_encoded_is_refused(tmp_path: Path, kspace, matrix: tuple[int, int]) -> None:
    """Readouts that are short at both ends, unlike an asymmetric echo; their field of view is anybody's guess."""
    with pytest.raises(InputError, match="neither complete, nor an asymmetric echo"):
        study(tmp_path, header(limits(0, NY - 1, NY // 2), matrix, oversampling=1.0), lines_of(kspace))


def test_less_than_half_of_the_lines_is_no_resolution(tmp_path: Path, kspace) -> None:
    with pytest.raises(InputError, match="at least half of the 120 lines of the encoded matrix, got 48"):
        study(tmp_path, header(limits(0, 119, 24), (120, NX)), lines_of(kspace))


def test_readouts_twice_as_long_as_the_header_says_are_refused(tmp_path: Path, kspace) -> None:
    """The encoded space without oversampling, the acquisitions with it."""
    with pytest.raises(InputError, match=r"readouts of 80 samples.*do not fit the encoded matrix's 40"):
        study(tmp_path, header(matrix=(NY, NX // 2), oversampling=1.0), lines_of(kspace))


def test_noise_leaves_the_word_to_the_header(tmp_path: Path) -> None:
    noise = complex_array(np.random.default_rng(0), 1, 2, 2, NY, NX)
    for lines, edit, first in ((lines_of(noise, counted_from(12)), limits(0, 35, 12), 12), (lines_of(noise), None, 0)):
        got = study(tmp_path, header(edit), lines)
        np.testing.assert_array_equal(got.views["sax"].kspace[..., first:, :], noise[..., first:, :])
        assert got.notes == ()
    untold = study(tmp_path, header(), lines_of(noise, lambda f: f | {"center_sample": 0}))
    np.testing.assert_array_equal(untold.views["sax"].kspace, noise)
    assert untold.notes == ()


# OCMR's pilot tone


def parameters(*names_and_values: tuple[str, int]) -> Callable[[Any], None]:
    def edit(parsed: Any) -> None:
        entries = [xsd.userParameterLongType(name=name, value=value) for name, value in names_and_values]
        parsed.userParameters = xsd.userParametersType(userParameterLong=entries)

    return edit


@pytest.mark.parametrize(
    ("entries", "on"),
    [
        ((("a", 0), ("b", 0), ("c", 0), ("PilotTone", 1)), True),
        ((("PilotTone", 1),), True),
        ((("a", 1), ("PilotTone", 0)), False),
        ((("a", 1), ("b", 1), ("c", 1), ("d", 1)), False),
    ],
)
def test_the_pilot_tone_is_taken_out_where_the_header_has_it(tmp_path: Path, kspace, entries, on: bool) -> None:
    toned = kspace.copy()
    toned[..., [0, 1, 2, -1]] = 200 * np.abs(kspace).max() if on else kspace[..., [0, 1, 2, -1]]
    got = study(tmp_path, header(parameters(*entries)), lines_of(toned))
    clean = kspace.copy()
    clean[..., [0, 1, 2, -1]] = 0 if on else kspace[..., [0, 1, 2, -1]]
    np.testing.assert_array_equal(got.views["sax"].kspace, clean)
    assert any("pilot tone" in note for note in got.notes) is on


def test_a_tone_that_the_header_does_not_have_is_refused(tmp_path: Path, kspace) -> None:
    toned = kspace.copy()
    toned[..., [0, 1, 2, -1]] = 200 * np.abs(kspace).max()
    with pytest.raises(InputError, match=r"by their energy|energy around sample"):
        study(tmp_path, header(), lines_of(toned))


def test_the_tone_is_no_noise(tmp_path: Path, kspace) -> None:
    """A noise measurement under the tone whitens as one without it."""
    rng = np.random.default_rng(0)
    noise = complex_array(rng, 3, 500)
    toned = noise.copy()
    toned[:, [0, 1, 2, -1]] = 1e4
    quiet = noise.copy()
    quiet[:, [0, 1, 2, -1]] = 0
    xml = header(parameters(("PilotTone", 1)))
    both = []
    for samples in (toned, quiet):
        scan = acquisition(samples, ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
        both.append(study(tmp_path, xml, iter([scan, *lines_of(kspace)])).views["sax"].kspace)
    np.testing.assert_array_equal(*both)


# files that vanish


def test_files_without_acquisitions_are_counted(tmp_path: Path, kspace) -> None:
    write_ismrmrd(tmp_path / "A.H5", header(), lines_of(kspace[:1, :, :1]))
    with h5py.File(tmp_path / "image.h5", "w") as file:
        file["image"] = np.zeros((4, 4))
    items = discover("ismrmrd", str(tmp_path))
    assert [item.subject for item in items] == ["A"]
    (left,) = unused("ismrmrd", str(tmp_path), items)
    assert (left.files, "without ISMRMRD acquisitions" in left.reason) == ((2,), True)
