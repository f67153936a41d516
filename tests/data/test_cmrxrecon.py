"""CMRxRecon's reader on files that the test writes: layouts, containers, orders of axes, promises."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from raw_files import complex_array, write_mat73

from kmtr.data.sources import Options, discover, matlab, read, unused
from kmtr.data.sources.cmrxrecon import infer_axes
from kmtr.data.sources.pseudonyms import pseudonym
from kmtr.physics.fourier import crop_or_pad, fft2c, ifft2c, ifftc
from kmtr.simulation import phantom
from kmtr.types import InputError


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("shape", "key", "readout_first", "expected"),
    [
        ((512, 246), "kspace_full", True, "kx ky"),
        ((246, 512), "kspace", False, "ky kx"),
        ((448, 162, 10), "underkspace", False, "kx ky coil"),
        ((10, 162, 448), "underkspace", False, "coil ky kx"),
        ((448, 162, 6), "kspace_single_full", True, "kx ky slice"),
        ((448, 162, 6, 12), "kspace_single_full", True, "kx ky slice t"),
        ((12, 6, 162, 448), "kspace_single_full", False, "t slice ky kx"),
        ((448, 162, 1, 12), "kspace_single_sub04", True, "kx ky slice t"),
        ((12, 6, 1, 162, 448), "kspace_single_full", False, "t slice coil ky kx"),
        ((12, 6, 10, 162, 448), "kspace_single_full", False, None),  # many coils, says the array; one, says its name
        ((448, 162, 10, 6), "kspace_full", True, None),  # one frame, or one slice
        ((6, 10, 162, 448), "kspace_sub04", False, None),
        ((12, 6, 162, 448), "kspace", False, None),
        ((448, 162, 10, 1), "kspace_full", True, "kx ky coil slice"),
        ((1, 10, 162, 448), "kus", False, "slice coil ky kx"),
        ((10, 1, 162, 448), "kspace_full", False, None),
        ((12, 6, 10, 162, 448), "kspace_full", False, "t slice coil ky kx"),
        ((448, 162, 10, 6, 12), "kspace_full", True, "kx ky coil slice t"),
        ((12, 162, 10, 448), "kspace", False, None),
        ((12, 12, 448), "kspace", False, None),
        ((448,), "kspace", False, None),
    ],
)
def test_rules_of_the_axes(shape, key: str, readout_first: bool, expected: str | None) -> None:
    names = infer_axes(shape, key, readout_first)
    assert (names and " ".join(names)) == expected


@pytest.mark.parametrize("matlab_order", [True, False])
def test_mat73_in_either_order_and_v5_agree(tmp_path: Path, rng, matlab_order: bool) -> None:
    shown = complex_array(rng, 3, 2, 4, 12, 16)  # t slice coil ky kx, as HDF5 shows MATLAB's kx ky coil slice t
    expected = shown.transpose(1, 2, 0, 3, 4)
    path = write_mat73(tmp_path / "P001" / "cine_sax.mat", "kspace_full", shown if matlab_order else shown.T)
    study = read(path)
    np.testing.assert_array_equal(study.views["sax"].kspace, expected)
    assert study.views["sax"].sampled is None
    assert study.subject_id == pseudonym("P001", b"kmtr")
    v5 = tmp_path / "v5" / "cine_sax.mat"
    v5.parent.mkdir()
    scipy.io.savemat(v5, {"kspace_full": shown.T, "note": "x"})
    np.testing.assert_array_equal(read(v5).views["sax"].kspace, expected)


def test_axes_override(tmp_path: Path, rng) -> None:
    array = complex_array(rng, 16, 12, 4)
    path = write_mat73(tmp_path / "cine_sax.mat", "kspace", array)
    kspace = read(path, Options(axes="ky kx t")).views["sax"].kspace
    np.testing.assert_array_equal(kspace[0, 0], array.transpose(2, 0, 1))
    for wrong in ("ky kx", "ky ky kx", "ky kx time", "coil slice t"):
        with pytest.raises(InputError, match="axes: expected 3 different names"):
            read(path, Options(axes=wrong))


def test_sampled_is_told_by_zeros(tmp_path: Path, rng) -> None:
    shown = complex_array(rng, 5, 2, 4, 12, 16)
    lines = rng.random((5, 2, 12)) < 0.4
    lines[:, :, 5:7] = True
    shown *= lines[:, :, None, :, None]
    path = write_mat73(tmp_path / "P001" / "cine_sax.mat", "kspace_sub04", shown)
    view = read(path).views["sax"]
    np.testing.assert_array_equal(view.sampled, lines.transpose(1, 0, 2))
    # A crop along the readout keeps the pattern; one along ky would mix lines.
    cropped = read(path, Options(matrix=(12, 8))).views["sax"]
    np.testing.assert_array_equal(cropped.sampled, view.sampled)
    np.testing.assert_array_equal((cropped.kspace != 0).any((1, -1)), view.sampled)
    with pytest.raises(InputError, match=r"matrix=12,8.*undersampled"):
        read(path, Options(matrix=(8, 8)))


def test_matrix_crops_full_kspace_in_the_image(tmp_path: Path, rng) -> None:
    image = complex_array(rng, 1, 1, 1, 13, 16)
    path = write_mat73(tmp_path / "cine_sax.mat", "kspace", fft2c(image)[0, 0, 0])
    view = read(path, Options(matrix=(8, 10))).views["sax"]
    np.testing.assert_allclose(ifft2c(view.kspace), crop_or_pad(image, (8, 10), (-2, -1)), atol=1e-5)


def test_zeros_that_are_no_lines_are_refused(tmp_path: Path, rng) -> None:
    shown = complex_array(rng, 5, 2, 4, 12, 16)
    radial = shown * (rng.random((5, 2, 1, 12, 16)) < 0.3)
    exchanged = shown * (rng.random(16) < 0.5)
    for n, array in enumerate((radial, exchanged)):
        path = write_mat73(tmp_path / str(n) / "cine_sax.mat", "kspace", array)
        with pytest.raises(InputError, match="pseudo-radial"):
            read(path)
    echo = shown.copy()
    echo[..., :5] = 0  # asymmetric echo
    assert read(write_mat73(tmp_path / "2" / "cine_sax.mat", "kspace", echo)).views["sax"].sampled is None


def test_cmrxrecon_discovery(tmp_path: Path, rng) -> None:
    for folder in ("Center002/A/P001", "Center001/A/P001", "Center001/B/P001"):
        array = complex_array(rng, 2, 8, 10)
        for name in ("cine_sax", "cine_lax_4ch", "cine_lax_r2ch", "cine_lax", "cine_sax_mask", "aorta_sag"):
            write_mat73(tmp_path / folder / f"{name}.mat", "kspace", array)
    items = discover("cmrxrecon", str(tmp_path))
    assert [item.subject for item in items] == ["Center001/A/P001", "Center001/B/P001", "Center002/A/P001"]
    assert sorted(read(items[0]).views) == ["lax_4ch", "sax"]
    # The same pseudonym whether the folder or its file is named.
    folder = tmp_path / "Center001" / "A" / "P001"
    assert read(folder).subject_id == read(folder / "cine_sax.mat").subject_id == read(items[0]).subject_id
    with pytest.raises(InputError, match="one view per file"):
        read(folder / "cine_lax.mat")
    with pytest.raises(InputError, match="expected one subject, got 3"):
        read(tmp_path)
    # One bad subject does not stop the others: it is refused when it is read.
    write_mat73(folder / "cine_sax_ktGaussian8.mat", "kspace", array)
    items = discover("cmrxrecon", str(tmp_path))
    assert [bool(item.problem) for item in items] == [True, False, False]
    with pytest.raises(InputError, match="two files for one view"):
        read(items[0])


def test_one_subject_twice_is_refused(tmp_path: Path, rng) -> None:
    for kind in ("FullSample", "UnderSample"):
        write_mat73(tmp_path / kind / "P001" / "cine_sax.mat", "kspace", complex_array(rng, 2, 8, 10))
    with pytest.raises(InputError, match="2 recordings of 1 subjects"):
        discover("cmrxrecon", str(tmp_path))


def test_cmrxrecon_refuses_in_one_line(tmp_path: Path, rng) -> None:
    def v5(name: str, **arrays: object) -> Path:
        scipy.io.savemat(tmp_path / name, arrays)
        return tmp_path / name

    junk = tmp_path / "junk.mat"
    junk.write_bytes(b"not a MATLAB file at all" * 40)
    cut = tmp_path / "cut.mat"
    cut.write_bytes(write_mat73(tmp_path / "cine_sax.mat", "kspace", complex_array(rng, 2, 8, 10)).read_bytes()[:900])
    empty = np.zeros((8, 10), np.complex64)
    for path, said in (
        (v5("a.mat", mask=np.ones((4, 4)), info="x"), "expected k-space .* got mask, info"),
        (v5("b.mat", kspace=np.ones((8, 10))), "expected complex numbers"),
        (v5("c.mat", kspace=np.array([{"a": 1}, "b"], dtype=object)), "complex"),
        (v5("d.mat", kspace=empty), "nothing but zeros"),
        (v5("e.mat", kspace=empty + np.nan), "finite"),
        (v5("f.mat", kspace=np.ones((8, 8, 8), np.complex64)), "give axes="),
        (junk, "cannot be read"),
        (cut, "cannot be read"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_the_same_number_in_two_sets_is_two_people(tmp_path: Path, rng) -> None:
    """2023 and 2024 count from P001 in each set; the kinds of one set (complete, undersampled) are one person's."""
    paths = [
        write_mat73(tmp_path / year / kind / "P001" / "cine_sax.mat", "kspace", complex_array(rng, 2, 8, 10))
        for year in ("MultiCoil/Cine/TrainingSet", "MultiCoil/Cine/ValidationSet")
        for kind in ("FullSample", "AccFactor04")
    ]
    ids = [read(path).subject_id for path in paths]
    assert ids[0] == ids[1] != ids[2] == ids[3]


@pytest.mark.parametrize(
    ("folder", "vendor", "tesla"),
    [
        ("TrainingSet/FullSample/Center001/UIH_30T_umr780/P001", "UIH", 3.0),
        ("TrainingSet/FullSample/Center002/Siemens_15T_Avanto/P001", "Siemens", 1.5),
        ("TrainingSet/FullSample/P001", None, None),
    ],
)
def test_scanner_of_the_2025_layout(tmp_path: Path, rng, folder: str, vendor: str | None, tesla: float | None) -> None:
    study = read(write_mat73(tmp_path / folder / "cine_sax.mat", "kspace", complex_array(rng, 2, 8, 10)))
    assert (study.vendor, study.field_strength_t) == (vendor, tesla)


def test_single_coil(tmp_path: Path, rng) -> None:
    shown = complex_array(rng, 3, 2, 12, 16)  # t slice ky kx
    path = write_mat73(tmp_path / "P001" / "cine_sax.mat", "kspace_single_full", shown)
    np.testing.assert_array_equal(read(path).views["sax"].kspace[:, 0], shown.transpose(1, 0, 2, 3))


def test_slices_of_one_frame_are_said(tmp_path: Path, rng) -> None:
    """The name tells one coil, not whether the last dimension is slices or frames."""
    path = write_mat73(tmp_path / "P001" / "cine_sax.mat", "kspace_single_full", complex_array(rng, 6, 12, 16))
    study = read(path)
    assert study.views["sax"].kspace.shape == (6, 1, 1, 12, 16)
    assert study.notes == ("sax: 6 slices of one frame; if these are frames of one slice, give axes= (ingest.axes=)",)
    told = read(path, Options(axes="t ky kx"))
    assert (told.views["sax"].kspace.shape, told.notes) == ((1, 1, 6, 12, 16), ())


def heart(coils: int = 4) -> np.ndarray:
    """``t slice coil ky kx``, as HDF5 shows MATLAB's order."""
    study = phantom.simulate(
        2, seed=0, views=("sax",), sax_slices=2, frames=3, matrix=(40, 48), snr_db=20.0, coils=coils, oversampling=1.0
    )
    return study.views["sax"].kspace.transpose(2, 0, 1, 3, 4)


@pytest.mark.parametrize(
    ("what", "made"),
    [
        ("around line 20 of 40, got it around", lambda k: np.fft.ifftshift(k, (-2, -1))),
        ("around sample 24 of 48, got it around", lambda k: np.fft.ifftshift(k, (-1,))),
        ("around line 20 of 40, got it around 26", lambda k: np.roll(k, 6, -2)),
        ("got images", ifft2c),
        ("got images", lambda k: np.abs(ifft2c(k)) * np.exp(1j)),
        ("got data transformed along kx", lambda k: ifftc(k, (-1,))),
        ("without an imaginary part", lambda k: np.abs(k) + 0j),
    ],
)
def test_what_is_no_centred_k_space_is_refused(tmp_path: Path, what: str, made) -> None:
    path = write_mat73(tmp_path / "P001" / "cine_sax.mat", "kspace_full", made(heart()).astype(np.complex64))
    with pytest.raises(InputError, match=what) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_unusual_k_space_is_read(tmp_path: Path) -> None:
    """Partial Fourier, an asymmetric echo, a dark slice, a coil of noise, few lines and no central one in a frame."""
    rng, full = np.random.default_rng(0), heart()
    zeros = np.ones_like(full)
    zeros[..., :14, :] = zeros[..., :12] = 0
    few = np.zeros((3, 1, 1, 40, 1))
    few[:, :, :, 1::4] = few[1:, :, :, 18:22] = 1
    few[0, ..., 17:22, :] = 0
    dark = full * np.array([1, 1e-5])[:, None, None, None]
    noisy = full.copy()
    noisy[:, :, 2] = complex_array(rng, *full[:, :, 2].shape) * 1e3 * np.abs(full).max()
    for n, (array, notes) in enumerate(((zeros * full, 0), (few * full, 1), (dark, 0), (noisy, 0))):
        path = write_mat73(tmp_path / str(n) / "cine_sax.mat", "kspace_full", array.astype(np.complex64))
        study = read(path)
        np.testing.assert_array_equal(study.views["sax"].kspace, array.astype(np.complex64).transpose(1, 2, 0, 3, 4))
        assert len(study.notes) == notes, study.notes
    assert read(tmp_path / "1" / "cine_sax.mat").notes == (
        "sax: 2 of 6 frames have no line within 2 of the centre of k-space",
    )


def test_why_files_are_not_used(tmp_path: Path, rng) -> None:
    for name in ("cine_sax", "cine_sax_mask", "cine_lax", "cine_lax_mask", "aorta_sag", "T1map"):
        write_mat73(tmp_path / "P001" / f"{name}.mat", "kspace", complex_array(rng, 2, 8, 10))
    items = discover("cmrxrecon", str(tmp_path))
    left = {files.reason.split(" (")[0]: len(files.files) for files in unused("cmrxrecon", str(tmp_path), items)}
    assert left == {
        "no cine by their names": 2,
        "long axes of several views in one file, whose order it does not tell": 1,
        "sampling patterns without their k-space beside them": 1,
    }


@pytest.mark.parametrize("names", [("cine_sax", "cine_sax_mask"), ("cine_sax_kus_Uniform4", "cine_sax_mask_Uniform4")])
def test_the_pattern_beside_must_be_the_lines(tmp_path: Path, rng, names: tuple[str, str]) -> None:
    lines = np.zeros(12, bool)
    lines[::4] = lines[5:8] = True
    shown = complex_array(rng, 3, 2, 1, 12, 16) * lines[:, None]
    path = write_mat73(tmp_path / "P001" / f"{names[0]}.mat", "kspace_sub04", shown)
    beside = path.with_name(f"{names[1]}.mat")
    for pattern, fits in ((lines, True), (np.roll(lines, 1), False), (lines[:-1], False)):
        with h5py.File(beside, "w") as file:
            file["mask04"] = np.repeat(pattern.astype(float)[:, None], 16, 1)
        if fits:
            np.testing.assert_array_equal(read(path).views["sax"].sampled, np.broadcast_to(lines, (2, 3, 12)))
        else:
            with pytest.raises(InputError, match="is it another's"):
                read(path)
    beside.write_bytes(b"junk")
    with pytest.raises(InputError, match="the pattern beside it: expected a MATLAB file"):
        read(path)
    # Beside complete k-space a pattern is only one that could be applied.
    write_mat73(path, "kspace_full", complex_array(rng, 3, 2, 1, 12, 16))
    assert read(path).views["sax"].sampled is None


def test_oversampling_by_the_table_beside(tmp_path: Path, rng) -> None:
    image = complex_array(rng, 3, 2, 4, 12, 16)
    path = write_mat73(tmp_path / "P001" / "cine_sax.mat", "kspace_full", fft2c(image))
    path.with_name("cine_sax_info.csv").write_text("FieldStrength,3\nReadOutOversample(x),2\n")
    removed = read(path).views["sax"].kspace
    np.testing.assert_allclose(ifft2c(removed), image[..., 4:12].transpose(1, 2, 0, 3, 4), atol=1e-5)
    assert read(path, Options(oversampling="keep")).views["sax"].kspace.shape[-1] == 16
    path.with_name("cine_sax_info.csv").write_text("ReadOutOversample,\n")
    assert read(path).views["sax"].kspace.shape[-1] == 16


@pytest.mark.parametrize("layout", [{}, {"chunks": (1, 1, 3, 5, 7)}, {"chunks": (2, 2, 4, 12, 16)}])
@pytest.mark.parametrize("packing", [{}, {"compression": 4}, {"compression": 9, "shuffle": True, "fletcher32": True}])
def test_chunks_are_put_together_as_hdf5_does(tmp_path: Path, rng, layout: dict, packing: dict) -> None:
    shown = complex_array(rng, 3, 2, 4, 12, 16)
    path = write_mat73(tmp_path / "cine_sax.mat", "kspace_full", shown, **layout, **packing)
    np.testing.assert_array_equal(read(path).views["sax"].kspace, shown.transpose(1, 2, 0, 3, 4))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", ["c8", "c16", "f8", "f4", "u1", "i2", "u4", "i8", "?"])
def test_v5_as_scipy_writes_it(tmp_path: Path, rng, packed: bool, dtype: str) -> None:
    """Every class of numbers, small elements (one value, short names), and neighbours of other kinds."""
    values = rng.normal(size=(3, 1, 4)) * 50
    array = (values + 1j * values[::-1]).astype(dtype) if dtype.startswith("c") else values.astype(dtype)
    others = {"a": 7.0, "text": "x" * 50, "cell": np.array([1, "b"], object), "record": {"k": np.eye(3)}}
    scipy.io.savemat(tmp_path / "a.mat", others | {"kspace": array, "e": 1 + 2j}, do_compression=packed)
    for name, want in (("kspace", array), ("a", np.array([[7.0]])), ("e", np.array([[1 + 2j]]))):
        got, key, matlab_order = matlab.load(tmp_path / "a.mat", "file", lambda names, _, name=name: name)
        np.testing.assert_array_equal(got, want)
        assert (key, matlab_order) == (name, True)
    assert matlab.load(tmp_path / "a.mat", "file", lambda names, _: "kspace")[0].dtype == (
        np.uint8 if dtype == "?" else np.dtype(dtype)
    )
    with pytest.raises(InputError, match="MATLAB struct"):
        matlab.load(tmp_path / "a.mat", "file", lambda names, _: "record")
