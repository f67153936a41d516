"""DICOM cine (MR and Enhanced MR images): magnitude, made complex by a simulated phase (`kmtr.data.sources.cine`).

Subjects. In a folder, searched to any depth: all folders of images whose header has the same PatientID; where that is
empty, the name of the folder directly under the source. Images of several studies (visits) under one PatientID are
refused for that subject. ``.zip`` archives are read as they are: UK Biobank's ``EID_20208_V_N.zip`` (long axes) and
``EID_20209_V_N.zip`` (short axis) of a subject's first visit together, any other archive as one subject named like it.

Images are grouped by the plane that their headers describe, never by file name: parallel ones of one size and kind
(their description without digits) are a stack, its slices are sorted by their position along the normal, a slice's
frames by trigger time (else temporal position or index, else instance number: all images of a slice need to have it,
different from each other; frames of one file lie in any order). Slices of another name that go on where a short axis
ends join it, or it is refused where their size differs. Where a slice was scanned again, the last complete scan counts.
Slices have one number of frames and one distance, or the subject is refused, since volumes would be wrong.

Views. A stack across the heart's axis is a short axis, unless its description names a long axis only; another is what
the description names (``2ch``, ``3 chamber``, ``sax``, ``sa``, ...). A long axis whose chambers nobody names, or two of
them, is left out rather than guessed. Left out too: phase images, colour, what has fewer than `MIN_FRAMES` frames
(scouts, maps), and series that are no plain cine by name, type, changing contrast or time between images. How many
images are left out, and why, is in `Study.notes`. `kmtr.data.sources.series` has these rules.

Values of MONOCHROME1 are turned over; all become rescale slope x value + intercept.
Nothing that identifies is kept: of the header only geometry, times, vendor, field strength and heart rate leave this
module; sex and age come by a table (`kmtr.data.dataset.tables`).
Contours: Sunnybrook's polygons (`kmtr.data.sources.polygons`) below a folder that is called as the subject, or as a
table in the source says (``*.csv`` with the columns PatientID and OriginalID), or below the images' own folder.
"""

from __future__ import annotations

import csv
import os
import re
import struct
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from kmtr.data.sources import Item, Options, check_size, check_stored, doubles, looked, optional, polygons, series
from kmtr.data.sources.cine import Cine, oriented, plausible_frame_time, to_study
from kmtr.types import InputError, Study

SOURCE = "dicom/2"

MR_IMAGES = ("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1")
"""Classes of MR images: one frame, or many (Enhanced)."""

GREY = ("MONOCHROME2", "MONOCHROME1")
"""Photometric interpretations of magnitudes; a palette has colours."""

CROOKED_MM = 1.0
"""Distance of a slice from where the first and the last have it, beyond which no affine tells its place."""
_CROOKED = "slices are not on one line: their place in the scanner is not kept"
MOST_FRAMES = 10_000
"""Frames of one subject at most."""

HEART_RATE_BPM = (20.0, 250.0)

VENDORS = ("Siemens", "GE", "Philips", "Canon", "Toshiba", "Hitachi", "Fujifilm", "UIH")
"""Vendors as they are kept; anything else in that field of a header could say who was scanned where."""

OTHER_IMAGES = (
    ".nii", ".nii.gz", ".hdr", ".img", ".mha", ".nrrd", ".mat", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff",
    ".tar", ".gz", ".xz", ".rar", ".7z",
)  # fmt: skip
"""Endings of files that may hold images of a heart in another way."""

_ARCHIVE = re.compile(r"(?P<subject>.+)_(?P<field>2020[89])_(?P<visit>\d+)_(?P<array>\d+)\.zip")
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_HEAD_BYTES = 1 << 20

_DAMAGE = (
    AttributeError, EOFError, LookupError, OSError, OverflowError, RuntimeError, TypeError, ValueError,
    struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""Errors that pydicom and zipfile raise on bytes that they didn't expect."""


# ----------------------------------------------------------------------------------------------------- which files


def find(source: Path) -> list[Item]:
    """Subjects in a file (image or archive) or folder; see the module. One header is read for each folder of images.

    Raises:
        InputError: nothing found.
    """
    if source.is_file():
        if source.suffix == ".zip":
            return _archive_items([source])
        if not _is_image(source):
            raise InputError(f"{source}: expected a DICOM image, a .zip of them, or a folder")
        return [Item("dicom", looked(_identity, source, ("", ""))[0] or source.resolve().parent.name, (source,))]
    images: dict[Path, Path] = {}
    contours, archives = [], []
    for name, folders, files in os.walk(source):
        folders.sort()
        paths = [Path(name, file) for file in sorted(files)]
        archives += [path for path in paths if path.suffix == ".zip"]
        if first := next((path for path in paths if _is_image(path)), None):
            images[Path(name)] = first
        if any(map(polygons.is_contour, paths)):
            contours.append(Path(name))
    items = _archive_items(archives) + _folder_items(source, images, contours)
    if not items:
        raise InputError(
            f"{source}: looked for DICOM images (.dcm, .ima, or DICM inside) and .zip archives, found none"
        )
    return items


def _archive_items(archives: Sequence[Path]) -> list[Item]:
    visits: dict[str, dict[int, dict[str, Path]]] = defaultdict(lambda: defaultdict(dict))
    items = []
    for path in sorted(archives):
        if match := _ARCHIVE.fullmatch(path.name):
            visits[match["subject"]][int(match["visit"])].setdefault(match["field"], path)
        else:
            items.append(Item("dicom", path.stem, (path,)))
    for subject, fields in visits.items():
        items.append(Item("dicom", subject, tuple(sorted(fields[min(fields)].values()))))
    return items


def _folder_items(source: Path, images: dict[Path, Path], contours: list[Path]) -> list[Item]:
    """Subjects of folders of images (each with its first image) and the folders of contours that are theirs."""
    alias = _aliases(source)
    folders: dict[str, list[Path]] = defaultdict(list)
    studies: dict[str, set[str]] = defaultdict(set)
    for folder, first in images.items():
        subject, study = looked(_identity, first, ("", ""))
        below = folder.relative_to(source).parts
        subject = subject or (below[0] if below else source.resolve().name)
        folders[subject].append(folder)
        studies[subject].add(study)
    items = []
    for subject, own in folders.items():
        names = {subject, alias.get(subject, subject)}
        drawn = [c for c in contours if names & set(c.relative_to(source).parts) or any(f in c.parents for f in own)]
        visits = len(studies[subject] - {""})
        problem = f"images of {visits} studies (visits?) of one subject; name the folder of one" if visits > 1 else ""
        items.append(Item("dicom", subject, tuple(sorted({*own, *drawn})), problem))
    return items


def _aliases(source: Path) -> dict[str, str]:
    """PatientID -> the name that contours know it by, from tables at the top of the source."""
    none: dict[str, str] = {}
    tables = [looked(_alias_table, path, none) for path in sorted(source.glob("*.csv"))]
    return {patient: name for table in tables for patient, name in table.items()}


def _alias_table(path: Path) -> dict[str, str]:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.DictReader(file)
        of = {name.lower().replace("_", ""): name for name in rows.fieldnames or () if name}
        if not {"patientid", "originalid"} <= set(of):
            return {}
        return {row[of["patientid"]]: row[of["originalid"]] for row in rows}


def why_unused(path: Path) -> str:
    """Why a file that no item reads is not read."""
    if polygons.is_contour(path):
        return "contours of nobody whose images are there"
    if path.name.startswith("."):
        return "hidden files"
    if path.suffix.lower() == ".zip":
        return "archives of a later visit, or a second one of a visit"
    return "files that hold no DICOM image"


def near(path: Path) -> bool:
    """True if a file without the endings of DICOM is counted where nobody reads it: contours, images of any kind."""
    return polygons.is_contour(path) or path.name.lower().endswith(OTHER_IMAGES) or _may_be_image(path.name)


def reads(path: Path) -> bool:
    """True if a file in the folder of an item is read."""
    return _is_image(path) or polygons.is_contour(path)


def _is_image(path: Path) -> bool:
    return (
        _may_be_image(path.name)
        and path.is_file()
        and (_starts_image(path.name, b"") or _starts_image(path.name, looked(_beginning, path, b"")))
    )


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(132)


def _may_be_image(name: str) -> bool:
    """True if a file may be an image by its ending, if any; names made of UIDs end in digits."""
    ending = Path(name).suffix.lower()
    known = ending in ("", ".dcm", ".ima") or ending[1:].isdigit()
    return known and not name.startswith(".") and name != "DICOMDIR"


def _starts_image(name: str, content: bytes) -> bool:
    """True if a file begins as DICOM does, with or without its meta header, or its name says that it should."""
    bare = content[:2] == b"\x08\0" and content[3:4] == b"\0"  # group 0008, as files without one begin
    return bare or content[128:132] == b"DICM" or name.lower().endswith((".dcm", ".ima"))


def _identity(path: Path) -> tuple[str, str]:
    """PatientID and StudyInstanceUID; empty where the file doesn't tell."""
    filereader = optional("pydicom.filereader")
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if _DEFLATED in head:
        return "", ""
    with warnings.catch_warnings(action="ignore"):
        dataset = filereader.read_partial(BytesIO(head), lambda tag, vr, length: tag > 0x0020000D)
        return str(dataset.get("PatientID") or "").strip(), str(dataset.get("StudyInstanceUID") or "")


def contents(item: Item) -> list[doubles.Content]:
    """Digests of the end of the first image, which is its pixels, and of every polygon; see `doubles`."""
    files = [path for folder in item.files if folder.is_dir() for path in sorted(folder.iterdir()) if path.is_file()]
    found: list[doubles.Content] = [
        ("contours", doubles.digest(path.read_bytes()))
        for path in files
        if polygons.is_contour(path) and path.stat().st_size <= polygons.MOST_BYTES
    ]
    image = next((path for path in files if _is_image(path)), None)
    if image is None:
        return found or doubles.of_files(item)
    size = image.stat().st_size
    end = doubles.piece_of(image, size - min(size // 8, doubles.PIECE_BYTES))
    return [*found, ("images", doubles.digest(end))] if len(set(end)) > doubles.VALUES else found


# --------------------------------------------------------------------------------------------------------- reading


def read(item: Item, where: str, subject_id: str, options: Options) -> Study:
    """The study of one subject, one coil; see `kmtr.data.sources.read`."""
    if options.axes:
        raise InputError("axes: DICOM names its axes itself; the key is for nifti and cmrxrecon")
    contours = [path for folder in item.files if folder.is_dir() for path in sorted(folder.iterdir())]
    contours = [path for path in contours if polygons.is_contour(path)]
    with warnings.catch_warnings(action="ignore"):  # pydicom's show values of the header
        frames: list[series.Frame] = []
        left = Counter[str]()
        patients: dict[Path | None, set[tuple[str, str]]] = defaultdict(set)
        for path, content in _contents(item.files, where, options):
            with _damage(where):
                identity, found, unused = _frames(content, where, options)
            patients[path if path.suffix == ".zip" else None].add(identity)  # an archive may have a code of its own
            frames += found
            left += unused
            _check_count(len(frames), where)
        for people in patients.values():
            for what, different in (
                ("patients", {p for p, _ in people}),
                ("studies (visits?)", {s for _, s in people}),
            ):
                if len(different) > 1:
                    raise InputError(f"{where}: images of {len(different)} {what} in one place; give each a folder")
        series.check_alike(frames, where)
        stacks, others = series.views(frames, where)
        notes = tuple(f"left out: {count} {reason}" for reason, count in sorted((left + others).items()))
        if not stacks:
            raise InputError(
                f"{where}: expected a cine of at least {series.MIN_FRAMES} frames across the heart's axis, or one "
                f"whose series description names sax, 2ch, 3ch or 4ch; found none among {len(frames)} MR images"
                + "".join(f"; {note}" for note in notes)
            )
        if contours and "sax" not in stacks:
            raise InputError(f"{where}: contours, but no short axis that they belong to")
        cines = {
            view: _cine(stack, view, contours if view == "sax" else [], where, options)
            for view, stack in stacks.items()
        }
        with _damage(where):
            vendor, tesla, rate = _scanner(next(iter(stacks.values())).first.dataset)
    labels = {} if rate is None else {"heart_rate_bpm": rate}
    study = to_study(subject_id, cines, labels, SOURCE, options, where, vendor=vendor, field_strength_t=tesla)
    return replace(study, notes=study.notes + notes)


@contextmanager
def _damage(where: str) -> Iterator[None]:
    """One line instead of whatever a damaged file makes pydicom raise."""
    try:
        yield
    except InputError:
        raise
    except optional("pydicom.errors").InvalidDicomError:
        raise InputError(
            f"{where}: a DICOM file cannot be read: it has no meta header (128 bytes, then DICM); if it is an image of "
            "an old exporter, rewrite it (dcmconv of DCMTK), else take it out"
        ) from None
    except _DAMAGE as error:
        raise InputError(f"{where}: a DICOM file cannot be read ({type(error).__name__}); fetch it again") from None


def _contents(files: Sequence[Path], where: str, options: Options) -> Iterator[tuple[Path, bytes]]:
    """Every image of a subject, no more than `options.most_bytes` all together, and the item's path that it lies in."""
    left = options.most_bytes

    def spend(size: int) -> None:
        nonlocal left
        if (left := left - size) < 0:
            limit = options.most_bytes / 2**30
            raise InputError(f"{where}: expected at most {limit:.3g} GiB of images; if it is more, raise ingest.gib")

    for path in files:
        if path.suffix == ".zip":
            with _damage(where), zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    name = Path(member.filename).name
                    if not member.is_dir() and _may_be_image(name):
                        spend(member.file_size)
                        content = archive.read(member)  # never more than file_size
                        if _starts_image(name, content):
                            yield path, content
        else:
            for image in sorted(path.iterdir()) if path.is_dir() else [path]:
                if _is_image(image):
                    spend(image.stat().st_size)
                    yield path, image.read_bytes()


def _frames(content: bytes, where: str, options: Options) -> tuple[tuple[str, str], list[series.Frame], Counter[str]]:
    """Patient and study, the usable frames of one file, and why others are not: MR images in shades of grey are."""
    if not content:
        raise InputError(f"{where}: a DICOM file cannot be read: it is empty; fetch it again")
    if _DEFLATED in content:
        raise InputError(f"{where}: deflated DICOM is not supported; store it uncompressed")
    dataset = optional("pydicom").dcmread(BytesIO(content))
    identity = str(dataset.get("PatientID") or "").strip(), str(dataset.get("StudyInstanceUID") or "")
    if str(dataset.get("SOPClassUID")) not in MR_IMAGES:
        return identity, [], Counter(["files that hold no MR image"])
    grey = str(dataset.get("PhotometricInterpretation") or GREY[0]) in GREY
    if not grey or int(dataset.get("SamplesPerPixel") or 1) != 1:
        return identity, [], Counter(["images in colour"])
    count = int(dataset.get("NumberOfFrames") or 1)
    check_size(where, "image", (count, int(dataset.Rows), int(dataset.Columns)), 8, options)
    _check_count(count, where)
    return identity, *series.frames(dataset, count)


def _check_count(count: int, where: str) -> None:
    if count > MOST_FRAMES:
        raise InputError(f"{where}: expected at most {MOST_FRAMES} frames of a subject, got {count} or more")


def _cine(stack: series.Stack, view: str, contours: list[Path], where: str, options: Options) -> Cine:
    """Stored values and contours of a stack, rescaled and oriented."""
    slices = [series.by_time(plane, where) for plane in stack.slices]
    counts = sorted({len(frames) for frames in slices})
    if len(counts) > 1:
        raise InputError(f"{where}: {view}: expected slices with equally many frames, got {counts}: some are missing")
    first, shape = slices[0][0], (len(slices), counts[0], *stack.first.shape)
    check_size(where, view, shape, 8, options)
    check_stored(where, view, (shape[0], 1, *shape[1:]), options)
    step, between_mm = _step(slices, view, where)
    stored = np.empty(shape, np.float32)
    for z, frames in enumerate(slices):
        for t, frame in enumerate(frames):
            stored[z, t] = _pixels(frame, where)
    classes = polygons.classes(contours, _places(slices, where), shape, where) if contours else None
    by_row, by_column = first.spacing_mm
    affine = np.eye(4)
    affine[:3, :3] = np.stack([first.axes[0] * by_column, first.axes[1] * by_row, step], 1)
    affine[:3, 3] = first.position
    zooms = None if between_mm is None else (by_column, by_row, between_mm)
    triggers = [frame.times[0] for frame in slices[0]]
    frame_time_s = plausible_frame_time(float(np.ptp(triggers)) / max(counts[0] - 1, 1) / 1000)
    placed = _on_one_line(slices, affine)
    affine[:2] *= -1  # left, posterior -> right, anterior
    x_y_z_t = (3, 2, 0, 1)
    classes = None if classes is None else classes.transpose(x_y_z_t)
    cine = oriented(stored.transpose(x_y_z_t), classes, affine, view, zooms, frame_time_s, placed=placed)
    return cine if placed else replace(cine, notes=(*cine.notes, _CROOKED))


def _on_one_line(slices: list[list[series.Frame]], affine: np.ndarray) -> bool:
    """True if each slice's corners lie where the affine has them, to a millimetre.

    Args:
        affine: voxel (x, y, slice) -> left, posterior, superior.
    """
    for z, (first, *_) in enumerate(slices):
        rows, columns = first.shape
        by_row, by_column = first.spacing_mm
        for x, y in ((0, 0), (columns - 1, 0), (0, rows - 1)):
            place = first.position + first.axes[0] * by_column * x + first.axes[1] * by_row * y
            if np.abs(affine[:3] @ (x, y, z, 1) - place).max() > CROOKED_MM:
                return False
    return True


def _step(slices: list[list[series.Frame]], view: str, where: str) -> tuple[np.ndarray, float | None]:
    """From one slice to the next: vector and distance in mm (None: unknown)."""
    first, last = slices[0][0], slices[-1][0]
    if len(slices) == 1:
        thickness = first.thickness_mm if first.thickness_mm > 0 else None
        return first.normal * (thickness or 1.0), thickness
    gaps = np.diff([frames[0].position @ first.normal for frames in slices])
    if np.ptp(gaps) > series.IRREGULAR * np.median(gaps):
        shown = ", ".join(f"{gap:g}" for gap in np.unique(gaps.round(1)))
        raise InputError(f"{where}: {view}: slices at irregular distances ({shown} mm): one missing, or two stacks?")
    return (last.position - first.position) / len(gaps), float(gaps.mean())


def _pixels(frame: series.Frame, where: str) -> np.ndarray:
    """float32 ``row column``, rescaled."""
    with _damage(where):
        syntax = frame.dataset.file_meta.TransferSyntaxUID
        try:
            pixels = frame.dataset.pixel_array
        except (NotImplementedError, RuntimeError):
            if not syntax.is_compressed:
                raise
            raise InputError(f"{where}: no decoder for {syntax.name}: pip install python-gdcm, or decompress") from None
        stored = pixels.reshape(-1, *frame.shape)[frame.number].astype(np.float32)
        if frame.dataset.get("PhotometricInterpretation") == "MONOCHROME1":  # small values are bright
            stored = _most(frame.dataset) - stored
    return stored * np.float32(frame.slope) + np.float32(frame.intercept)


def _most(dataset: Any) -> np.float32:
    """Sum of the smallest and the largest value that fit in the stored bits: what a negative is taken from."""
    return np.float32(-1 if int(dataset.PixelRepresentation) else 2 ** int(dataset.BitsStored) - 1)


def _places(slices: list[list[series.Frame]], where: str) -> dict[int, tuple[int, int]]:
    """Instance number -> (slice, frame)."""
    numbers = [(frame.times[2], (z, t)) for z, frames in enumerate(slices) for t, frame in enumerate(frames)]
    places = {int(number): place for number, place in numbers if np.isfinite(number)}
    if len(places) < len(numbers):
        raise InputError(f"{where}: contours name images by instance number, but several images have the same or none")
    return places


def _scanner(dataset: Any) -> tuple[str | None, float | None, float | None]:
    """All of a header that is kept beside the geometry: vendor, field strength in tesla, heart rate in 1/min."""
    name = str(dataset.get("Manufacturer") or "")
    vendor = next((v for v in VENDORS if re.search(rf"\b{v}\b", name, re.IGNORECASE)), None)
    field = series.numbers([dataset], "MagneticFieldStrength")
    tesla = float(field[0]) if len(field) and field[0] > 0 else None
    tesla = tesla / 1e4 if tesla and tesla > 100 else tesla  # some write gauss
    interval_ms = series.numbers([dataset], "NominalInterval")
    rates = [*series.numbers([dataset], "HeartRate"), *(60_000 / interval_ms[interval_ms > 0])]
    low, high = HEART_RATE_BPM
    return vendor, tesla, next((float(rate) for rate in rates if low <= rate <= high), None)
