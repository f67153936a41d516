"""Readers of source files: one module per format, each turning the files of one subject into a `Study`.

`discover` finds the subjects under a file or folder, `read` reads one of them. A reader's module has

    find(source) -> list[Item]                                          which files belong to which subject
    read(item, where, subject_id, matrix=, seed=, axes=) -> Study       `where` is what messages call the source

It is imported when it is used, and what it needs beyond numpy is the extra ``kmtr[readers]``.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from kmtr.data.pseudonym import pseudonym
from kmtr.types import InputError, Study

FORMATS = {
    "nifti": (".nii", ".nii.gz"),
    "cmrxrecon": (".mat",),
}
"""Format, which is also the name of its module here -> endings of its files."""


@dataclass(frozen=True, order=True)
class Item:
    """One subject of a source.

    Attributes:
        format: one of FORMATS.
        subject: the source's own name of the subject. Private, as are the paths: neither is shown by `repr`.
        files: the files that belong to the subject, sorted.
    """

    format: str
    subject: str = field(repr=False)
    files: tuple[Path, ...] = field(repr=False)


def discover(format: str, source: str) -> list[Item]:
    """The subjects of `format` in `source`, a file or a folder that is searched to any depth; sorted by subject.

    Raises:
        InputError: unknown format, no such source, nothing found, or one subject found twice.
    """
    reader, path = _reader(format), Path(source)
    if not path.exists():
        raise InputError(f"source: expected a file or folder, got {source!r}, which does not exist")
    items = sorted(reader.find(path))
    subjects = {item.subject for item in items}
    if len(subjects) < len(items):
        raise InputError(
            f"{source}: {len(items)} recordings of {len(subjects)} subjects; expected one of each (the same subject in "
            "two folders, say complete and undersampled?), so name the folder of one kind"
        )
    return items


def read(
    item_or_path: Item | str | Path,
    *,
    format: str | None = None,
    matrix: tuple[int, int] | None = None,
    seed: int = 0,
    subject_key: bytes = b"kmtr",
    axes: str | None = None,
) -> Study:
    """One subject as a `Study`.

    Args:
        item_or_path: an item of `discover`, or a file or folder that holds exactly one subject.
        format: one of FORMATS; None: told by the file ending.
        matrix: (ny, nx) that the image is cropped or zero-padded to about its centre, never rescaled. None: as stored.
        seed: of what is simulated (the phase of magnitude images), together with subject and slice.
        subject_key: key of the pseudonym, 1 to 64 bytes. The default hides names from a reader, not from an attacker.
        axes: what the dimensions of the stored array are, such as ``"t slice coil ky kx"``, where the rules of the
            reader guess wrong (cmrxrecon only).

    Raises:
        InputError: unreadable, ambiguous or unsupported source; the message names what the caller named, never
            a subject.
    """
    if matrix is not None and min(matrix) < 1:
        raise InputError(f"matrix: expected (ny, nx) of at least 1, got {matrix}")
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
    return _reader(item.format).read(item, where, subject_id, matrix=matrix, seed=seed, axes=axes)


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
    found = [format for format, endings in FORMATS.items() if any(name.endswith(endings) for name in names)]
    if len(found) != 1:
        raise InputError(f"{path}: cannot tell the format from the file endings, give format={'|'.join(FORMATS)}")
    return found[0]
