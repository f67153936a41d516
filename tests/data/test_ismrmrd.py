"""ISMRMRD files written by the `ismrmrd` package: what was measured comes back, wherever the header puts it."""

from __future__ import annotations

from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest
from raw_files import acquisition, complex_array, lines_of, write_ismrmrd, xml_header

from kmtr.data.sources import Options, discover, read
from kmtr.data.sources.pseudonyms import pseudonym
from kmtr.physics.fourier import crop_or_pad, ifft2c
from kmtr.simulation.acquisition import acquire
from kmtr.types import InputError

SHAPE = (3, 2, 4, 12, 16)  # slice coil t ky kx


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def kspace(rng: np.random.Generator) -> np.ndarray:
    return complex_array(rng, *SHAPE)


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) ** 2 / np.linalg.norm(want) ** 2)


def without(*left_out: dict[str, int]):
    """A change of `lines_of` that leaves out the lines with any of these header fields."""
    return lambda fields: None if any(set(f.items()) <= set(fields.items()) for f in left_out) else fields


def test_a_simulated_study_reads_back(tmp_path: Path, rng) -> None:
    """Oversampling kept: the k-space as measured. Removed: as measured by a readout of the image's own size."""
    images = rng.random((3, 4, 24, 32)).astype(np.float32)

    def measured(oversampling: float) -> np.ndarray:
        key = {"coils": 5, "snr_db": np.inf, "seed": 1, "subject": 2}
        series = [acquire(image, oversampling=oversampling, slice_index=n, **key) for n, image in enumerate(images)]
        return np.stack(series)

    over, plain = measured(2.0), measured(1.0)
    assert over.shape[-1] == 2 * plain.shape[-1]
    path = write_ismrmrd(tmp_path / "subject.h5", xml_header((24, 64), oversampling=2.0), lines_of(over), append=True)
    kept = read(path, Options(oversampling="keep")).views["sax"]
    removed = read(path, Options(oversampling="remove"))
    assert nmse(kept.kspace, over) < 1e-12
    assert nmse(removed.views["sax"].kspace, plain) < 1e-6
    for view in (kept, removed.views["sax"]):
        assert view.sampled is None
        assert view.spacing_mm == pytest.approx((10.0, 1.5, 1.25))
        assert view.frame_time_s == pytest.approx(0.04)
    assert (removed.vendor, removed.field_strength_t) == ("Siemens", pytest.approx(1.494))
    assert removed.subject_id == pseudonym("subject", b"kmtr")
    assert not any(private in repr(removed) for private in ("Jane", "Elsewhere"))


@pytest.mark.parametrize("oversampling", ["keep", "remove"])
def test_matrix_crops_the_image(tmp_path: Path, kspace, oversampling) -> None:
    path = write_ismrmrd(tmp_path / "a.h5", xml_header((12, 16), oversampling=2.0), lines_of(kspace))
    view = read(path, Options(matrix=(10, 6), oversampling=oversampling)).views["sax"]
    expected = crop_or_pad(ifft2c(kspace), (10, 6), (-2, -1))
    np.testing.assert_allclose(ifft2c(view.kspace), expected, atol=1e-5)


def test_order_in_the_file_does_not_matter(tmp_path: Path, kspace, rng) -> None:
    lines = list(lines_of(kspace))
    path = write_ismrmrd(tmp_path / "a.h5", xml_header(SHAPE[3:]), [lines[n] for n in rng.permutation(len(lines))])
    np.testing.assert_array_equal(read(path).views["sax"].kspace, kspace)


def test_repetitions_are_frames_where_there_is_one_phase(tmp_path: Path, kspace) -> None:
    def real_time(fields: dict) -> dict:
        t = fields.pop("phase")
        return fields | {"repetition": t, "acquisition_time_stamp": 1000 + 24 * t, "physiology_time_stamp": (0, 0, 0)}

    view = read(write_ismrmrd(tmp_path / "a.h5", xml_header(SHAPE[3:]), lines_of(kspace, real_time))).views["sax"]
    np.testing.assert_array_equal(view.kspace, kspace)
    assert view.frame_time_s == pytest.approx(0.06)


def test_frame_time_only_where_the_unit_is_known(tmp_path: Path, kspace) -> None:
    path = write_ismrmrd(tmp_path / "a.h5", xml_header(SHAPE[3:], vendor="GE MEDICAL SYSTEMS"), lines_of(kspace))
    study = read(path)
    assert study.vendor == "GE"
    assert study.views["sax"].frame_time_s is None


def test_undersampling_is_told_by_the_lines_that_are_there(tmp_path: Path, kspace, rng) -> None:
    sampled = rng.random((3, 4, 12)) < 0.4
    sampled[..., 6] = True

    def change(fields: dict) -> dict | None:
        return fields if sampled[fields["slice"], fields["phase"], fields["kspace_encode_step_1"]] else None

    path = write_ismrmrd(tmp_path / "a.h5", xml_header(SHAPE[3:], oversampling=2.0), lines_of(kspace, change))
    view = read(path, Options(oversampling="keep")).views["sax"]
    np.testing.assert_array_equal(view.sampled, sampled)
    np.testing.assert_array_equal(view.kspace, kspace * sampled[:, None, ..., None])
    removed = read(path).views["sax"]
    np.testing.assert_array_equal((removed.kspace != 0).any((1, -1)), sampled)
    with pytest.raises(InputError, match=r"matrix=12,8.*undersampled"):
        read(path, Options(matrix=(8, 8)))


def test_partial_fourier(tmp_path: Path, kspace) -> None:
    """The scanner counts lines from the first that it measures; the limits say which is the central one."""
    skipped = 4

    def change(fields: dict) -> dict | None:
        line = fields["kspace_encode_step_1"] - skipped
        return fields | {"kspace_encode_step_1": line} if line >= 0 else None

    path = write_ismrmrd(tmp_path / "a.h5", xml_header(SHAPE[3:], centre=6 - skipped), lines_of(kspace, change))
    view = read(path).views["sax"]
    assert not view.sampled[..., :skipped].any()
    assert view.sampled[..., skipped:].all()
    np.testing.assert_array_equal(view.kspace[..., skipped:, :], kspace[..., skipped:, :])


def test_asymmetric_echo_and_discarded_samples(tmp_path: Path, kspace) -> None:
    """Of 16 samples the first 6 were not measured; 2 more at the front and 1 at the end are to be thrown away."""
    cut = kspace[..., 6:]
    fields = {"center_sample": 2, "discard_pre": 2, "discard_post": 1}
    path = write_ismrmrd(tmp_path / "a.h5", xml_header(SHAPE[3:]), lines_of(cut, lambda f: f | fields))
    expected = np.zeros_like(kspace)
    expected[..., 8:15] = kspace[..., 8:15]
    view = read(path).views["sax"]
    np.testing.assert_array_equal(view.kspace, expected)
    assert view.sampled is None


def test_averages_are_averaged(tmp_path: Path, kspace, rng) -> None:
    second = complex_array(rng, *SHAPE)
    lines = [*lines_of(kspace), *lines_of(second, lambda f: (f | {"average": 1}) if f["slice"] else None)]
    view = read(write_ismrmrd(tmp_path / "a.h5", xml_header(SHAPE[3:]), lines)).views["sax"]
    np.testing.assert_array_equal(view.kspace[0], kspace[0])
    np.testing.assert_allclose(view.kspace[1:], (kspace + second)[1:] / 2, atol=1e-6)


def test_slices_by_position_from_base_to_apex(tmp_path: Path, kspace) -> None:
    """Interleaved counters, and a normal that points to the base: the apex is to the left, anterior and inferior."""
    heights = [20.0, 0.0, 10.0]
    normal = np.array([-1, 1, 1]) / np.sqrt(3)

    def change(fields: dict) -> dict:
        place = -normal * heights[fields["slice"]] + [7, 8, 9]
        return fields | {"position": tuple(place), "slice_dir": tuple(normal)}

    view = read(write_ismrmrd(tmp_path / "a.h5", xml_header(SHAPE[3:]), lines_of(kspace, change))).views["sax"]
    np.testing.assert_array_equal(view.kspace, kspace[[1, 2, 0]])
    assert view.spacing_mm == pytest.approx((10.0, 1.5, 1.25), rel=1e-4)


def test_without_positions_the_counter_orders(tmp_path: Path, kspace) -> None:
    path = write_ismrmrd(
        tmp_path / "a.h5", xml_header(SHAPE[3:]), lines_of(kspace, lambda f: f | {"position": (0, 0, 0)})
    )
    view = read(path).views["sax"]
    np.testing.assert_array_equal(view.kspace, kspace)
    assert view.spacing_mm is None
    one = write_ismrmrd(tmp_path / "b.h5", xml_header(SHAPE[3:]), lines_of(kspace[:1]))
    assert read(one).views["sax"].spacing_mm == pytest.approx((8.0, 1.5, 1.25))  # of one slice: its thickness


@pytest.mark.parametrize(
    "flag",
    [
        ismrmrd.ACQ_IS_NAVIGATION_DATA,
        ismrmrd.ACQ_IS_PHASECORR_DATA,
        ismrmrd.ACQ_IS_PHASE_STABILIZATION,
        ismrmrd.ACQ_IS_DUMMYSCAN_DATA,
        ismrmrd.ACQ_IS_HPFEEDBACK_DATA,
        ismrmrd.ACQ_IS_RTFEEDBACK_DATA,
        ismrmrd.ACQ_IS_SURFACECOILCORRECTIONSCAN_DATA,
    ],
)
def test_what_is_no_image_is_left_out(tmp_path: Path, kspace, rng, flag: int) -> None:
    """Even where its channels, samples and encoded space are others."""
    other = acquisition(complex_array(rng, 3, 20), flag, slice=9, contrast=2)
    path = write_ismrmrd(tmp_path / "a.h5", xml_header(SHAPE[3:]), [other, *lines_of(kspace), other])
    np.testing.assert_array_equal(read(path).views["sax"].kspace, kspace)


@pytest.mark.parametrize(("mode", "used"), [("embedded", True), ("separate", False), (None, False)])
def test_calibration_lines(tmp_path: Path, kspace, mode: str | None, used: bool) -> None:
    """Every second line is imaged; 5 and 7 are calibration only, 4 and 6 both."""
    lines = []
    for line in lines_of(kspace):
        ky = line.idx.kspace_encode_step_1
        if ky in (5, 7):
            line.set_flag(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION)
        elif ky in (4, 6):
            line.set_flag(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
        elif ky % 2:
            continue
        lines.append(line)
    view = read(write_ismrmrd(tmp_path / "a.h5", xml_header(SHAPE[3:], calibration=mode), lines)).views["sax"]
    expected = sorted({0, 2, 4, 6, 8, 10} | ({5, 7} if used else set()))
    np.testing.assert_array_equal(np.flatnonzero(view.sampled[0, 0]), expected)
    assert (view.sampled == view.sampled[0, 0]).all()


def test_noise_measurements_whiten(tmp_path: Path, rng) -> None:
    """Noise that the coils share comes out white, in the image's lines as in the measurement; signals stay linear."""
    mixing = complex_array(rng, 4, 4) + 2 * np.eye(4)
    noise = (mixing @ complex_array(rng, 4, 20_000)).astype(np.complex64)
    image_noise = np.einsum("cd,sdtyx->sctyx", mixing, complex_array(rng, 1, 4, 8, 24, 32)).astype(np.complex64)
    scans = [acquisition(part, ismrmrd.ACQ_IS_NOISE_MEASUREMENT) for part in np.split(noise, 4, 1)]
    xml = xml_header((24, 32))
    kspace = read(write_ismrmrd(tmp_path / "a.h5", xml, [*scans, *lines_of(image_noise)])).views["sax"].kspace
    samples = kspace[0].reshape(4, -1).astype(complex)
    covariance = samples @ samples.conj().T / samples.shape[1]
    np.testing.assert_allclose(covariance / covariance[0, 0].real, np.eye(4), atol=0.06)
    raw = read(write_ismrmrd(tmp_path / "b.h5", xml, lines_of(image_noise))).views["sax"].kspace
    solved, *_ = np.linalg.lstsq(raw[0].reshape(4, -1).T, samples.T, rcond=None)
    np.testing.assert_allclose(raw[0].reshape(4, -1).T @ solved, samples.T, atol=1e-4)
    with pytest.raises(InputError, match="noise of the image's 4 channels"):
        read(write_ismrmrd(tmp_path / "c.h5", xml, [acquisition(noise[:3, :500], 19), *lines_of(image_noise)]))


@pytest.mark.parametrize(
    ("protocol", "name", "view"),
    [
        ("trufi_cine_4ch_prop_trigger", "fs_0001_1_5T", "lax_4ch"),  # OCMR's
        ("RT_Cine_SAX", "us_0001_3T", "sax"),
        ("cine 2-chamber", "a", "lax_2ch"),
        ("short axis stack", "a", "sax"),
        ("anything", "cine_lax_3ch", "lax_3ch"),
        ("RT_Cine_SAX", "4ch", "lax_4ch"),  # the name of the file is the user's own word
        ("bssfp", "a", None),
        ("2ch_and_4ch", "a", None),
        ("saturation_12ch", "a", None),
    ],
)
def test_view_by_the_names(tmp_path: Path, kspace, protocol: str, name: str, view: str | None) -> None:
    path = write_ismrmrd(tmp_path / f"{name}.h5", xml_header(SHAPE[3:], protocol=protocol), lines_of(kspace[:1, :, :1]))
    if view is None:
        with pytest.raises(InputError, match="cannot tell the view"):
            read(path)
    else:
        assert list(read(path).views) == [view]


def test_a_folder_of_files_is_a_subject_where_the_names_say_only_views(tmp_path: Path, kspace) -> None:
    xml = xml_header(SHAPE[3:], protocol="cine")
    for n in (2, 0, 1):  # one breath-hold, one slice, one file each
        here = {"position": (0, 0, -10.0 * n)}
        write_ismrmrd(tmp_path / "jane" / f"sax_{3 - n}.h5", xml, lines_of(kspace[n : n + 1], lambda f, h=here: f | h))
    write_ismrmrd(tmp_path / "jane" / "lax_4ch.mrd", xml, lines_of(kspace[:1]))
    write_ismrmrd(tmp_path / "fs_0001.h5", xml_header(SHAPE[3:]), lines_of(kspace[:1]))
    (tmp_path / "cut.h5").write_bytes((tmp_path / "fs_0001.h5").read_bytes()[:3000])
    (tmp_path / "notes.txt").write_text("x")
    items = discover("ismrmrd", str(tmp_path))
    assert [(item.subject, len(item.files)) for item in items] == [("cut", 1), ("fs_0001", 1), ("jane", 4)]
    study = read(items[2])
    assert sorted(study.views) == ["lax_4ch", "sax"]
    np.testing.assert_array_equal(study.views["sax"].kspace, kspace)
    with pytest.raises(InputError, match="cannot be read") as caught:
        read(items[0])
    assert "cut" not in str(caught.value)


def test_hdf5_files_of_others_are_left_out(tmp_path: Path, kspace) -> None:
    with h5py.File(tmp_path / "image.h5", "w") as file:
        file["image"] = np.zeros((4, 4))
    with pytest.raises(InputError, match="found none"):
        discover("ismrmrd", str(tmp_path))
    write_ismrmrd(tmp_path / "a.h5", xml_header(SHAPE[3:]), lines_of(kspace[:1, :, :1]))
    assert [item.subject for item in discover("ismrmrd", str(tmp_path))] == ["a"]


def test_only_what_is_used_of_the_header_must_be_right(tmp_path: Path, kspace) -> None:
    """Dates that de-identification has spoilt, and elements of a newer schema."""
    xml = xml_header(SHAPE[3:]).replace(
        "<measurementInformation>",
        "<studyInformation><studyDate>XX.YY.2019</studyDate></studyInformation><new>1</new><measurementInformation>",
    )
    np.testing.assert_array_equal(
        read(write_ismrmrd(tmp_path / "a.h5", xml, lines_of(kspace))).views["sax"].kspace, kspace
    )
