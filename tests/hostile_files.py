"""Bad raw data, one builder each: files as they break, and files as somebody would break them on purpose.

A builder is given an empty folder and returns what the reader is pointed at; `CORPUS` says what the reader must answer.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import ismrmrd
import numpy as np
import scipy.io
from raw_files import acquisition, complex_array, lines_of, write_ismrmrd, write_mat73, xml_header


@dataclass(frozen=True)
class Case:
    """`said`: regular expression of the one line that refuses what `build` leaves in a folder."""

    name: str
    format: str
    said: str
    build: Callable[[Path], Path]


CORPUS: list[Case] = []


def bad(format: str, said: str) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    def register(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
        CORPUS.append(Case(build.__name__, format, said, build))
        return build

    return register


def family(format: str, name: str, said: str, build: Callable[[Path], Path]) -> None:
    CORPUS.append(Case(name, format, said, build))


RNG = np.random.default_rng(0)
LARGE = 160 << 20
BOMB = zlib.compress(bytes(LARGE), 1)
"""Less than a MB that inflates to `LARGE`."""


def cut(path: Path, share: float = 0.5) -> Path:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# CMRxRecon

FULL = complex_array(RNG, 3, 2, 4, 12, 16)  # t slice coil ky kx


def mat(folder: Path, array: np.ndarray = FULL, key: str = "kspace", **layout: Any) -> Path:
    return write_mat73(folder / "P001" / "cine_sax.mat", key, array, **layout)


def changed(where: Any, value: complex) -> np.ndarray:
    array = FULL.copy()
    array[where] = value
    return array


def v5(folder: Path, **arrays: Any) -> Path:
    scipy.io.savemat(folder / "cine_sax.mat", arrays, do_compression=True)
    return folder / "cine_sax.mat"


def hdf5(folder: Path, fill: Callable[[h5py.File], Any], name: str = "cine_sax.mat") -> Path:
    with h5py.File(folder / name, "w") as file:
        fill(file)
    return folder / name


LINES = np.arange(12) % 3 == 0

for name, said, build in (
    ("v73_truncated", "cannot be read", lambda f: cut(mat(f))),
    ("v73_truncated_in_its_data", "cannot be read", lambda f: cut(mat(f), 0.98)),
    ("v5_truncated", "cannot be read", lambda f: cut(v5(f, kspace=FULL.T))),
    ("mat_zero_size", "cannot be read", lambda f: written(f / "cine_sax.mat", b"")),
    ("mat_is_text", "cannot be read", lambda f: written(f / "cine_sax.mat", b"MATLAB is not this" * 99)),
    ("mat_is_a_nifti", "cannot be read",
     lambda f: written(f / "cine_sax.mat", struct.pack("<i", 348) + bytes(344) + b"n+1\0" + bytes(9999))),
    ("no_kspace", "expected k-space .* got image", lambda f: mat(f, key="image")),
    ("real_numbers", "expected complex", lambda f: v5(f, kspace=FULL.real.T)),
    ("struct_instead_of_array", "got a MATLAB struct", lambda f: v5(f, kspace={"a": FULL.T})),
    ("only_zeros", "nothing but zeros", lambda f: mat(f, 0 * FULL)),
    ("nan", "finite", lambda f: mat(f, changed((1, 1, 2, 3, 4), np.nan))),
    ("infinity", "finite", lambda f: mat(f, changed((0, 0, 0, 0, 0), np.inf))),
    ("lines_and_samples_exchanged", "ky and kx are exchanged", lambda f: mat(f, FULL * (np.arange(16) % 3 == 0))),
    ("pseudo_radial", "pseudo-radial", lambda f: mat(f, FULL * (RNG.random((12, 16)) < 0.4))),
    ("v5_name_that_is_none", "a name that is none", lambda f: renamed(v5u(f), b"kspace", b"k\nx\x00\xff!")),
    ("ambiguous_axes", "give axes=", lambda f: mat(f, complex_array(RNG, 3, 12, 2, 16, 4))),
    ("seven_dimensions", "give axes=", lambda f: mat(f, complex_array(RNG, 1, 1, 1, 1, 2, 8, 9))),
    ("missing_frame", "no line of slice 1, frame 2", lambda f: mat(f, changed((2, 1), 0) * LINES[:, None])),
    ("slice_copied", "slices 0 and 1 hold the same", lambda f: mat(f, np.repeat(FULL[:, :1], 2, 1))),
    ("name_of_many_lines", "got no array at all", lambda f: mat(f, key="kspace\nTraceback")),
    ("no_slices", "expected an array that holds something", lambda f: mat(f, FULL[:, :0])),
    ("text_as_kspace", "expected an array of numbers",
     lambda f: hdf5(f, lambda h: h.create_dataset("kspace", data="x"))),
    ("checksum_wrong", "damaged or not of the size", lambda f: flipped(mat(f, chunks=FULL.shape, fletcher32=True))),
    ("unknown_filter", "expected gzip", lambda f: mat(f, compression="lzf")),
    ("claims_terabytes_in_chunks", "raise ingest.gib", lambda f: hdf5(f, claimed(chunks=(1, 16, 16)))),
    ("claims_terabytes_at_once", "raise ingest.gib", lambda f: hdf5(f, claimed(chunks=None))),
    ("claims_what_was_never_written", "never written", lambda f: hdf5(f, claimed((8, 64, 64), chunks=(1, 64, 64)))),
    ("claims_space_never_written", "less than the array", lambda f: hdf5(f, claimed((8, 64, 64), chunks=None))),
    ("soft_link_loop", "got no array", lambda f: hdf5(f, looped)),
):  # fmt: skip
    family("cmrxrecon", name, said, build)


def claimed(shape: tuple[int, ...] = (1 << 14, 1 << 14, 1 << 14), **layout: Any) -> Callable[[h5py.File], Any]:
    return lambda file: file.create_dataset("kspace", shape, "c8", **layout)


def looped(file: h5py.File) -> None:
    file["kspace"] = h5py.SoftLink("/kspace_full")
    file["kspace_full"] = h5py.SoftLink("/kspace")
    file.create_group("group")["up"] = file["/"]


@bad("cmrxrecon", "got no array at all")
def external_link(folder: Path) -> Path:
    other = mat(folder)
    return hdf5(folder, lambda file: file.__setitem__("kspace", h5py.ExternalLink(other, "kspace")), "linked.mat")


@bad("cmrxrecon", "reference to other files")
def virtual_data_set(folder: Path) -> Path:
    layout = h5py.VirtualLayout((4, 12, 16), "c8")
    layout[:] = h5py.VirtualSource(mat(folder), "kspace", (4, 12, 16))
    return hdf5(folder, lambda file: file.create_virtual_dataset("kspace", layout), "virtual.mat")


@bad("cmrxrecon", "reference to other files")
def external_storage(folder: Path) -> Path:
    secret = written(folder / "secret", bytes(range(1, 129)))
    return hdf5(folder, lambda h: h.create_dataset("kspace", (4, 4), "c8", external=[(secret, 0, 128)]))


@bad("cmrxrecon", "damaged or not of the size")
def chunk_that_inflates(folder: Path) -> Path:
    def fill(file: h5py.File) -> None:
        data = file.create_dataset("kspace", (64, 64), "c8", chunks=(64, 64), compression="gzip")
        data.id.write_direct_chunk((0, 0), BOMB)

    return hdf5(folder, fill)


@bad("cmrxrecon", "expected gzip")
def chunk_packed_twice(folder: Path) -> Path:
    def fill(file: h5py.File) -> None:
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((64, 64))
        settings.set_deflate(9)
        settings.set_deflate(9)
        space = h5py.h5s.create_simple((64, 64))
        data = h5py.h5d.create(file.id, b"kspace", h5py.h5t.py_create(np.dtype("c8")), space, settings)
        data.write_direct_chunk((0, 0), zlib.compress(BOMB, 1))

    return hdf5(folder, fill)


@bad("cmrxrecon", "a chunk of kspace.*raise ingest.gib")
def chunk_larger_than_memory(folder: Path) -> Path:
    return hdf5(folder, claimed((4, 4), chunks=(1 << 14, 1 << 14), maxshape=(None, None), compression="gzip"))


@bad("cmrxrecon", "damaged or not of the size")
def chunk_damaged(folder: Path) -> Path:
    return flipped(mat(folder, compression=4, chunks=FULL.shape))


def flipped(path: Path) -> Path:
    """Bits of one byte turned over, in the middle of the only chunk."""
    with h5py.File(path, "r+") as file:
        packed = bytearray(file["kspace"].id.read_direct_chunk((0,) * 5)[1])
        packed[len(packed) // 2] ^= 0xFF
        file["kspace"].id.write_direct_chunk((0,) * 5, bytes(packed))
    return path


@bad("cmrxrecon", "is it another's")
def pattern_of_another(folder: Path) -> Path:
    path = mat(folder, FULL * LINES[:, None], "kspace_sub04")
    scipy.io.savemat(path.with_name("cine_sax_mask.mat"), {"mask04": np.repeat(np.roll(LINES, 1)[None], 16, 0)})
    return path


@bad("cmrxrecon", "a part larger than its array")
def v5_that_inflates(folder: Path) -> Path:
    """One compressed variable whose shape is 2 x 2 and whose numbers go on for 160 MB."""
    head = v5(folder, kspace=np.ones((2, 2))).read_bytes()[:128]
    shape = struct.pack("<IIII", 6, 8, 6, 0) + struct.pack("<IIii", 5, 8, 2, 2)
    numbers = struct.pack("<II6s2x", 1, 6, b"kspace") + struct.pack("<II", 9, LARGE) + bytes(LARGE)
    packed = zlib.compress(struct.pack("<II", 14, len(shape + numbers)) + shape + numbers, 1)
    return written(folder / "cine_sax.mat", head + struct.pack("<II", 15, len(packed)) + packed)


@bad("cmrxrecon", "no array|cannot be read")
def v5_that_is_not_what_it_says(folder: Path) -> Path:
    head = v5(folder, kspace=np.ones((2, 2))).read_bytes()[:128]
    return written(folder / "cine_sax.mat", head + struct.pack("<II", 15, len(BOMB)) + BOMB)


def v5u(folder: Path) -> Path:
    """Not compressed, of 1357 x 2."""
    scipy.io.savemat(folder / "cine_sax.mat", {"kspace": np.ones((1357, 2), complex)})
    return folder / "cine_sax.mat"


def renamed(path: Path, old: bytes, new: bytes) -> Path:
    return written(path, path.read_bytes().replace(old, new, 1))


@bad("cmrxrecon", "raise ingest.gib")
def v5_claims_terabytes(folder: Path) -> Path:
    return renamed(v5u(folder), struct.pack("<i", 1357), struct.pack("<i", 1 << 30))


# ISMRMRD

SHAPE = (2, 2, 3, 12, 16)
KSPACE = complex_array(RNG, *SHAPE)


def mrd(
    folder: Path,
    change: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None,
    *,
    kspace: np.ndarray = KSPACE,
    edit: Callable[[str], str] = str,
    more: tuple[ismrmrd.Acquisition, ...] = (),
    **header: Any,
) -> Path:
    return write_ismrmrd(folder / "a.h5", edit(xml_header(SHAPE[3:], **header)), [*more, *lines_of(kspace, change)])


def with_(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Puts these into the header of one line: the sixth of the second slice's third frame."""
    at = {"slice": 1, "phase": 2, "kspace_encode_step_1": 5}
    return lambda head: head | (fields if at.items() <= head.items() else {})


def edited(path: Path, change: Callable[[h5py.Group], None]) -> Path:
    with h5py.File(path, "r+") as file:
        change(file["dataset"])
    return path


def replaced(name: str, make: Callable[[h5py.Group], Any]) -> Callable[[Path], Path]:
    def change(group: h5py.Group) -> None:
        del group[name]
        made = make(group)
        if made is not None:
            group[name] = made

    return lambda folder: edited(mrd(folder), change)


def xml(text: bytes) -> Callable[[Path], Path]:
    return lambda folder: edited(mrd(folder), lambda group: group["xml"].__setitem__(0, text))


def heads(change: Callable[[np.ndarray], None]) -> Callable[[Path], Path]:
    """Rewrites headers behind the package's back, the data as they were."""

    def edit(group: h5py.Group) -> None:
        rows = group["data"][()]
        change(rows["head"])
        group["data"][...] = rows

    return lambda folder: edited(mrd(folder), edit)


def claim(samples: int, channels: int) -> Callable[[np.ndarray], None]:
    def change(head: np.ndarray) -> None:
        head["number_of_samples"], head["active_channels"] = samples, channels

    return change


def noise_of_a_dead_channel() -> ismrmrd.Acquisition:
    noise = complex_array(RNG, 2, 256)
    noise[1] = 0
    return acquisition(noise, ismrmrd.ACQ_IS_NOISE_MEASUREMENT)


LAUGHS = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><ismrmrdHeader>&b;</ismrmrdHeader>'
SPREAD = [(0, 0, 3), (0, 0, -7), (0, 0, -27)]

for name, said, build in (
    ("mrd_truncated", "cannot be read", lambda f: cut(mrd(f))),
    ("mrd_zero_size", "cannot be read", lambda f: written(f / "a.h5", b"")),
    ("mrd_is_text", "cannot be read", lambda f: written(f / "a.mrd", b"raw data" * 99)),
    ("mrd_is_another_hdf5", "one group with acquisitions", lambda f: mat(f).rename(f / "a.h5")),
    ("no_header", "one group with acquisitions", replaced("xml", lambda group: None)),
    ("header_is_no_xml", "XML header cannot be read", xml(b"<ismrmrdHeader><encoding>")),
    ("header_of_something_else", "XML header cannot be read|expected", xml(b"<html><body>404</body></html>")),
    ("header_with_entities", "plain XML without entities", xml(LAUGHS)),
    ("header_in_utf16", "plain XML without entities",
     replaced("xml", lambda group: np.array([LAUGHS.decode().encode("utf-16")]))),
    ("header_without_end", "at most 1 MiB", xml(b"<!-- " + b"x" * (2 << 20))),
    ("header_with_words_for_numbers", "matrix size and field of view",
     lambda f: mrd(f, edit=lambda x: x.replace("<x>16</x>", "<x>many</x>"))),
    ("header_without_matrix_size", "do not fit",
     lambda f: mrd(f, edit=lambda x: x.replace("<x>16</x>", ""))),
    ("header_without_reconstruction", "XML header cannot be read",
     lambda f: mrd(f, edit=lambda x: x.replace("reconSpace>", "otherSpace>"))),
    ("header_of_no_lines", "2D encoded matrix", lambda f: mrd(f, edit=lambda x: x.replace("<y>12</y>", "<y>0</y>"))),
    ("header_of_a_vast_matrix", "at least half of the 2000000000 lines",
     lambda f: mrd(f, edit=lambda x: x.replace("<y>12</y>", "<y>2000000000</y>"))),
    ("three_dimensional", "2D encoded matrix", lambda f: mrd(f, edit=lambda x: x.replace("<z>1</z>", "<z>32</z>"))),
    ("radial", "Cartesian", lambda f: mrd(f, trajectory="radial")),
    ("view_unknown", "cannot tell the view", lambda f: mrd(f, protocol="localizer")),
    ("noise_only", "image, got none", lambda f: mrd(f, lambda head: None, more=(noise_of_a_dead_channel(),))),
    ("noise_of_a_dead_channel", "noise|covariance|channel", lambda f: mrd(f, more=(noise_of_a_dead_channel(),))),
    ("nan_in_one_sample", "finite", lambda f: mrd(f, kspace=np.where(np.arange(16) == 3, np.nan, KSPACE))),
    ("line_beyond_the_matrix", "lines 0 to 99", lambda f: mrd(f, with_(kspace_encode_step_1=99))),
    ("sample_beyond_the_matrix", "do not fit", lambda f: mrd(f, with_(center_sample=2))),
    ("all_samples_discarded", "do not fit", lambda f: mrd(f, with_(discard_pre=16))),
    ("frame_missing_in_one_slice", "no line of slice 1, frame 2",
     lambda f: mrd(f, lambda h: None if (h["slice"], h["phase"]) == (1, 2) else h)),
    ("frame_missing_in_all", "frame 1 of 0 to 2 is missing",
     lambda f: mrd(f, lambda h: None if h["phase"] == 1 else h)),
    ("slices_at_one_place", "at the same place", lambda f: mrd(f, lambda h: h | {"position": (1, 1, 1)})),
    ("slice_copied_elsewhere", "hold the same samples", lambda f: mrd(f, kspace=np.repeat(KSPACE[:1], 2, 0))),
    ("mixed_spacing", "10.0 to 20.0 mm apart",
     lambda f: mrd(f, lambda h: h | {"position": SPREAD[h["slice"]]}, kspace=complex_array(RNG, 3, *SHAPE[1:]))),
    ("tilted_slices", "parallel",
     lambda f: mrd(f, lambda h: h | {"slice_dir": (0.0, 0.6, 0.8) if h["slice"] else (0, 0, 1)})),
    ("normal_of_no_direction", "of length 1", lambda f: mrd(f, lambda h: h | {"slice_dir": (0, 0, 0)})),
    ("position_of_no_place", "numbers that are none", lambda f: mrd(f, lambda h: h | {"position": (np.inf, 1, 1)})),
    ("moving_slice", "at several places", lambda f: mrd(f, with_(position=(0, 0, 90)))),
    ("two_contrasts", "2 contrasts", lambda f: mrd(f, with_(contrast=1))),
    ("third_dimension", "lines of a third dimension", lambda f: mrd(f, with_(kspace_encode_step_2=1))),
    ("phases_and_repetitions", "phases or repetitions", lambda f: mrd(f, with_(repetition=1))),
    ("unknown_encoding", "encoded space 3", lambda f: mrd(f, with_(encoding_space_ref=3))),
    ("channels_vary", "2 numbers of channels",
     lambda f: mrd(f, more=(acquisition(complex_array(RNG, 3, 16), position=(0, 0, 3)),))),
    ("reversed_readout", "reversed", heads(lambda head: head["flags"].__ior__(np.uint64(1 << 21)))),
    ("claims_more_samples_than_it_has", "expected 2 x 15 samples, got 32", heads(claim(15, 2))),
    ("claims_a_million_channels", "raise ingest.gib", heads(claim(65535, 65535))),
    ("claims_no_samples", "holds something|do not fit", heads(claim(0, 2))),
    ("data_of_another_kind", "list of ISMRMRD", replaced("data", lambda group: np.ones((4, 4)))),
    ("data_elsewhere", "one group with", replaced("data", lambda group: h5py.ExternalLink("b.h5", "/dataset/data"))),
    ("data_in_a_loop", "one group with", replaced("data", lambda group: h5py.SoftLink("/dataset/data"))),
    ("group_in_a_loop", "one group with", replaced("data", lambda group: group)),
    ("claims_a_billion_rows", "raise ingest.gib|holds less", lambda f: edited(mrd(f), resized(1 << 30))),
    ("claims_rows_never_written", "holds less", lambda f: edited(mrd(f), resized(20_000))),
    ("rows_compressed", "not compressed", replaced("data", lambda group: compressed(group))),
):  # fmt: skip
    family("ismrmrd", name, said, build)


def resized(rows: int) -> Callable[[h5py.Group], None]:
    return lambda group: group["data"].resize(rows, 0)


def compressed(group: h5py.Group) -> None:
    group.create_dataset("data", (100,), ismrmrd.hdf5.acquisition_dtype, chunks=(100,), compression="gzip")
