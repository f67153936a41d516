"""Readers of source files: one module per format, each turning the files of one subject into a `Study`.

`discover` finds the subjects under a file or folder, `read` reads one of them. A reader's module has

    find(source) -> list[Item]                              which files belong to which subject
    read(item, where, subject_id, options) -> Study         `where` is what messages call the source
    why_unused(path) -> str                                 optional: why a file that no item has is not read (`unused`)
    near(path) -> bool                                      optional: whether a file of another ending is counted there
    reads(path) -> bool                                     optional: whether a file in an item's folder is read at all
    contents(item) -> list[doubles.Content]                 optional: by what a subject under two names is told

What `find` asks of a file it asks by `looked`, so that one that cannot be read does not end the search: it counts as
what its name says, and `read` refuses that subject alone.

Nothing vanishes: files that belong to no subject are counted by `unused`, and what `read` leaves out of a subject's
files it says in `Study.notes`. Both end in ``refused.json`` and in one line.

It is imported when it is used, and what it needs beyond numpy is the extra ``kmtr[readers]``.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeVar

from kmtr.data.sources import anatomy, doubles
from kmtr.data.sources.payload import check_payload
from kmtr.data.sources.pseudonyms import pseudonym
from kmtr.physics.coils import combined, compress
from kmtr.types import InputError, Study

Told = TypeVar("Told")

FORMATS = {
    "nifti": (".nii", ".nii.gz"),
    "dicom": (".dcm", ".zip"),
    "cmrxrecon": (".mat",),
    "ismrmrd": (".h5", ".mrd"),
}
"""Format, which is also the name of its module here -> endings of its files."""


@dataclass(frozen=True, order=True)
class Item:
    """One subject of a source.

    Attributes:
        format: one of FORMATS.
        subject: the source's own name of the subject. Private, as are the paths: neither is shown by `repr`.
        files: the files or folders that belong to the subject, sorted.
        problem: why the subject can't be read, found while looking for files: `read` refuses it with these words, and
            the others are read all the same. Empty: nothing is wrong so far.
    """

    format: str
    subject: str = field(repr=False)
    files: tuple[Path, ...] = field(repr=False)
    problem: str = ""


@dataclass(frozen=True)
class Options:
    """Options of reading, beside what the files say.

    Attributes:
        matrix: (ny, nx) that the image is cropped or zero-padded to about its centre, never rescaled. None: as stored.
        seed: of what is simulated (the phase of magnitude images), together with subject and slice.
        axes: what the dimensions of the stored array are, such as ``"t slice coil ky kx"``, where the rules of the
            reader guess wrong (cmrxrecon; nifti, with x y slice t). Empty: by the rules.
        oversampling: readout oversampling of raw data, where the source tells it, is kept or removed.
        coils: virtual coils at most, see `with_coils`; 0: as acquired.
        most_bytes: largest array that a file may claim to hold.
        classes: what the values of contours mean, such as ``"1:lv_cavity,2:lv_myocardium,3:rv"``, where file name and
            shape mislead (short axes of nifti only). Empty: by these.
        dtype: that k-space will be stored in, for `check_stored`.
    """

    matrix: tuple[int, int] | None = None
    seed: int = 0
    axes: str = ""
    oversampling: Literal["keep", "remove"] = "remove"
    coils: int = 0
    most_bytes: int = 4 << 30
    classes: str = ""
    dtype: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        if self.matrix is not None and min(self.matrix) < 1:
            raise InputError(f"matrix: expected (ny, nx) of at least 1, got {self.matrix}")
        anatomy.parse(self.classes)


def check_size(where: str, what: str, shape: Sequence[int], itemsize: int, options: Options) -> None:
    """Refuse what a header claims before memory is asked for it.

    Raises:
        InputError: an empty array, or one of more than `options.most_bytes`.
    """
    if not shape or min(shape) < 1:
        raise InputError(f"{where}: {what}: expected an array that holds something, got shape {tuple(shape)}")
    if (size := math.prod(shape) * itemsize) > options.most_bytes:
        raise InputError(
            f"{where}: {what}: expected at most {options.most_bytes / 2**30:.3g} GiB, the header claims "
            f"{size / 2**30:.3g} GiB {tuple(shape)}; if that is true, raise ingest.gib"
        )


def check_stored(where: str, view: str, shape: Sequence[int], options: Options) -> None:
    """Refuse a view that no shard can hold before it is read, by what its header claims.

    Args:
        shape: slice, coil, t, ky, kx of the source; `options` may leave fewer coils and another matrix.

    Raises:
        InputError: as `payload.check_payload`.
    """
    slices, coils, frames, *matrix = shape
    coils = min(coils, options.coils) if options.coils else coils
    check_payload(f"{where}: {view}", (slices, coils, frames, *(options.matrix or matrix)), options.dtype)


def discover(format: str, source: str) -> list[Item]:
    """The subjects of `format` in `source`, a file or a folder that is searched to any depth; sorted by subject.

    A subject found twice is one item with a problem, unless that is so for all of them; so is a subject with the images
    or the contours of another (`doubles`).

    Raises:
        InputError: unknown format, no such source, nothing found, or every subject found twice.
    """
    reader, path = _reader(format), Path(source)
    if not path.exists():
        raise InputError(f"source: expected a file or folder, got {source!r}, which does not exist")
    found: dict[str, list[Item]] = {}
    for item in sorted(_found(reader, path)):
        found.setdefault(item.subject, []).append(item)
    if all(len(items) > 1 for items in found.values()):
        raise InputError(
            f"{source}: {sum(map(len, found.values()))} recordings of {len(found)} subjects; expected one of each (the "
            "same subject in two folders, say complete and undersampled?), so name the folder of one kind"
        )
    single = [items[0] if len(items) == 1 else _twice(items) for items in found.values()]
    return doubles.marked(single, getattr(reader, "contents", doubles.of_files)) if len(single) > 1 else single


def looked(look: Callable[[Path], Told], path: Path, otherwise: Told) -> Told:
    """Answer of `look` about a file while subjects are looked for; `otherwise` where the file or a library fails."""
    try:
        return look(path)
    except Exception:  # libraries have no common class; `read` meets it again and refuses that subject in one line
        return otherwise


def _found(reader: ModuleType, source: Path) -> list[Item]:
    try:
        return list(reader.find(source))
    except OSError as error:  # of the source itself, or of a folder that went away meanwhile
        raise InputError(f"{source}: it cannot be searched: {error.strerror or type(error).__name__}") from None


@dataclass(frozen=True)
class Unused:
    """Files of a source that belong to no subject.

    Attributes:
        reason: why they are not read; names no file.
        files: their numbers, from 1, among all paths below the source in the order of their names
            (``find SOURCE -mindepth 1 | LC_ALL=C sort``): whoever has the source finds them, nobody else learns a name.
    """

    reason: str
    files: tuple[int, ...]


def unused(format: str, source: str, items: Sequence[Item]) -> list[Unused]:
    """The files of `format` below a folder that no item has, by reason, most files first.

    Counted are files with an ending of the format, or that the reader's ``near(path)`` accepts (other images), links
    that lead nowhere or to folders, which no search follows, and folders that cannot be opened; in a folder that an
    item has, of these, what the reader's ``reads(path)`` denies. A reader's
    ``why_unused(path)`` gives the reason; an empty one means that the file is used after all, as a pattern beside its
    k-space is.
    """
    reader, path = _reader(format), Path(source)
    why = getattr(reader, "why_unused", lambda path: "files of a name that this reader does not know")
    near = getattr(reader, "near", lambda path: False)
    reads = getattr(reader, "reads", lambda path: True)
    taken = {file for item in items for file in item.files}
    found: dict[str, list[int]] = {}
    for number, file in enumerate(sorted(path.rglob("*"), key=os.fspath), 1):
        if file in taken or (file.parent in taken and looked(reads, file, True)):
            continue
        if file.is_symlink() and not file.is_file():
            reason = "links to folders or to files that are not there"
        elif file.is_dir():
            reason = "" if os.access(file, os.R_OK | os.X_OK) else "folders that cannot be opened"
        elif file.is_file() and (file.name.lower().endswith(FORMATS[format]) or looked(near, file, True)):
            reason = looked(why, file, "files that cannot be opened")
        else:
            continue
        if reason:
            found.setdefault(reason, []).append(number)
    return [Unused(reason, tuple(numbers)) for reason, numbers in sorted(found.items(), key=lambda f: (-len(f[1]), f))]


def _twice(items: list[Item]) -> Item:
    files = tuple(sorted({path for item in items for path in item.files}))
    return Item(items[0].format, items[0].subject, files, f"{len(items)} recordings of this subject; leave one of them")


def read(
    item_or_path: Item | str | Path,
    options: Options | None = None,
    *,
    format: str | None = None,
    subject_key: bytes = b"kmtr",
) -> Study:
    """One subject as a `Study`.

    Args:
        item_or_path: an item of `discover`, or a file or folder that holds exactly one subject.
        options: None: the defaults of `Options`.
        format: one of FORMATS; None: told by the file ending.
        subject_key: key of the pseudonym, 1 to 64 bytes. The default hides names from a reader, not from an attacker.

    Raises:
        InputError: unreadable, ambiguous or unsupported source; the message names what the caller named, never
            a subject.
    """
    if isinstance(item_or_path, Item):
        item = item_or_path
        subject_id = pseudonym(item.subject, subject_key)
        where = subject_id
    else:
        where = str(item_or_path)
        items = discover(format or _format_of(Path(item_or_path)), where)
        if len(items) > 1:
            raise InputError(f"{where}: expected one subject, got {len(items)}; read them with discover()")
        item = items[0]
        subject_id = pseudonym(item.subject, subject_key)
    if item.problem:
        raise InputError(f"{where}: {item.problem}")
    if options and options.classes and item.format != "nifti":
        raise InputError("ingest.classes: only contours of nifti have values, expected none")
    try:
        study = _reader(item.format).read(item, where, subject_id, options or Options())
        return with_coils(study, options.coils) if options and options.coils else study
    except MemoryError:
        raise InputError(f"{where}: needs more memory than there is; lower ingest.gib to refuse it earlier") from None
    except OSError as error:  # without the file's name
        raise InputError(f"{where}: a file cannot be read: {error.strerror or type(error).__name__}") from None


def with_coils(study: Study, coils: int) -> Study:
    """The study with at most `coils` virtual coils per slice (`physics.coils`).

    They are the leading principal directions of its acquired lines; one coil of a fully sampled view is the adaptive
    combination instead, which loses nothing that other coils see.
    """
    views = {}
    for name, view in study.views.items():
        if coils == 1 < view.kspace.shape[1] and (view.sampled is None or view.sampled.all()):
            kspace = combined(view.kspace)
        else:
            kspace = compress(view.kspace, view.sampled, coils)
        views[name] = replace(view, kspace=kspace)
    return replace(study, views=views)


def version(format: str) -> str:
    """Format and version of its reader: the same text, the same reading."""
    return str(_reader(format).SOURCE)


def optional(module: str) -> ModuleType:
    """An import from the extra ``readers``. Raises InputError, naming the extra, where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"this source needs {module.partition('.')[0]}, which is not installed: pip install kmtr[readers]"
        ) from None


def _reader(format: str) -> ModuleType:
    if format not in FORMATS:
        raise InputError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    return importlib.import_module(f"kmtr.data.sources.{format}")


def _format_of(path: Path) -> str:
    names = [path.name] if path.is_file() else [child.name for child in path.rglob("*") if child.is_file()]
    found = [format for format, endings in FORMATS.items() if any(name.lower().endswith(endings) for name in names)]
    if len(found) != 1:
        raise InputError(f"{path}: cannot tell the format from the file endings, give format={'|'.join(FORMATS)}")
    return found[0]
