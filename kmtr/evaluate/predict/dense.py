"""Dense outputs of a model (masks, images): a table of each, and NIfTI files where the size of a pixel is known."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Shaped

from kmtr.config import Data
from kmtr.data.affine import Affine
from kmtr.data.dataset import storage
from kmtr.data.loader.masks import chosen_spacing_mm, grid_affine
from kmtr.data.loader.shapes import choose, full_shape, places_of
from kmtr.data.sources import optional
from kmtr.types import UNLABELLED

NIFTI = "nifti"
UPRIGHT = 1e-3
"""Largest cosine between axes that a qform, which knows no shears, may stand for."""
_SAFE = re.compile(r"\w[\w-]{0,99}")


class Tables:
    """Files of the dense outputs of one part, written as they come.

    A table lies in a folder called after its output. A row is one subject at one R: ``values`` holds the array of
    ``shape`` (slice t y x, on the grid of the model's matrix), of the type that the schema's ``kmtr.dtype`` says;
    slices are those of ``kmtr.slices`` (view -> first and last + 1), those that the subject lacks too.

    Args:
        files: closes them; what it is left by with an error leaves no file.

    Attributes:
        written: arrays.
        unplaced: views of subjects without a NIfTI file, since the size of a pixel is not known.
        nowhere: NIfTI files without a place in the scanner, since the dataset does not know it.
    """

    def __init__(self, out: str, number: int, data: Data, files: ExitStack):
        self.out, self.number, self.data, self.files = out, number, data, files
        self.written = self.unplaced = self.nowhere = 0
        self._writers: dict[str, pq.ParquetWriter] = {}

    def add(
        self,
        names: Sequence[str],
        meta: pa.Table,
        acceleration: int,
        true: Float[np.ndarray, " subject"],
        outputs: Mapping[str, Shaped[np.ndarray, "subject slice t y x"]],
        before: int = 0,
    ) -> None:
        """Write the outputs for some subjects.

        Args:
            meta: their rows in the dataset, without payloads.
            before: subjects of the part that were written earlier.
        """
        for output, arrays in outputs.items():
            columns = {
                "subject": pa.array(names, pa.string()),
                "acceleration": pa.array(np.full(len(names), acceleration, np.int32)),
                "true_acceleration": pa.array(true),
                "shape": pa.array([list(array.shape) for array in arrays], pa.list_(pa.int32())),
                "values": pa.array([array.tobytes() for array in arrays], pa.large_binary()),
            }
            slices = {view: [at.start, at.stop] for view, at in places_of(self.data, full_shape(self.data))}
            table = pa.table(columns).replace_schema_metadata(
                {"kmtr.dtype": str(arrays.dtype), "kmtr.slices": json.dumps(slices)}
            )
            if output not in self._writers:
                sink = self.files.enter_context(storage.writing(self.out, f"{output}/part-{self.number:05d}.parquet"))
                writer = pq.ParquetWriter(sink, table.schema, compression="zstd")
                self._writers[output] = self.files.enter_context(writer)
            self._writers[output].write_table(table)
            self.written += len(arrays)
            for i, array in enumerate(arrays):
                stem = f"{_file_name(names[i], self.number, before + i)}_R{acceleration}"
                for view, content in self._volumes(array, meta, i):
                    self._put(f"{NIFTI}/{stem}_{view}_{output}.nii.gz", content)

    def _volumes(
        self, array: Shaped[np.ndarray, "slice t y x"], meta: pa.Table, row: int
    ) -> Iterator[tuple[str, bytes]]:
        """View -> NIfTI file of what there is of it, of one subject."""
        for view, slots in places_of(self.data, full_shape(self.data)):
            stored: dict[str, Any] = {
                kind: meta.column(f"{kind}_{view}")[row].as_py()
                for kind in ("shape", "acquired", "spacing_mm", "frame_time_s", "affine")
            }
            if stored["shape"] is None:
                continue
            if stored["spacing_mm"] is None:
                self.unplaced += 1
                continue
            frames = min(stored["shape"][2], array.shape[1])
            every = _on_all_slices(array[slots][:, :frames], stored["shape"][0])
            spacing = chosen_spacing_mm(stored, self.data, len(every))
            frame_time_s = (stored["frame_time_s"] or 0.0) * stored["shape"][2] / frames
            affine = grid_affine(stored, self.data)
            self.nowhere += affine is None
            yield view, nifti(every, spacing, frame_time_s, affine)

    def _put(self, name: str, content: bytes) -> None:
        with storage.writing(self.out, name) as sink:
            sink.write(content)


def _on_all_slices(values: Shaped[np.ndarray, "chosen t y x"], slices: int) -> Shaped[np.ndarray, "slice t y x"]:
    """Values on all slices of the source, of which the model saw some: those may be at uneven distances, which no
    geometry of a file can say. The others are UNLABELLED in masks, 0 in images.
    """
    chosen = choose(slices, len(values), centred=True)
    fill = UNLABELLED if values.dtype == np.uint8 else 0
    found = np.full((slices, *values.shape[1:]), fill, values.dtype)
    found[chosen] = values[: len(chosen)]
    return found


def nifti(
    values: Shaped[np.ndarray, "slice t y x"],
    spacing_mm: tuple[float, float, float],
    frame_time_s: float,
    affine: Affine | None = None,
    still: bool = False,
) -> bytes:
    """A compressed NIfTI-1 file with axes x y slice t; the same bytes for the same values.

    Args:
        spacing_mm: between slices, height and width of a pixel.
        frame_time_s: 0: unknown.
        affine: as `View.affine`; None: unknown, and the file says so (codes of qform and sform 0). One that shears is
            the sform alone.
        still: the only frame, without an axis of its own.

    Raises:
        InputError: nibabel is not installed.
    """
    array = values.transpose(3, 2, 0, 1)
    array = array[..., 0] if still else array
    image = optional("nibabel").Nifti1Image(np.ascontiguousarray(array), None)
    between, height, width = spacing_mm
    image.header.set_zooms((width, height, between, frame_time_s)[: array.ndim])
    image.header.set_xyzt_units("mm", "sec")
    if affine is not None:
        image.set_sform(affine, "scanner")
        directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        if np.allclose(directions.T @ directions, np.eye(3), atol=UPRIGHT):
            image.set_qform(affine, "scanner")
    return gzip.compress(image.to_bytes(), 6, mtime=0)


def parquet(table: pa.Table) -> bytes:
    """Content of a Parquet file of a table."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _file_name(subject: str, part: int, row: int) -> str:
    """A pseudonym as it may stand in a file's name; a number for one that may not."""
    return subject if _SAFE.fullmatch(subject) else f"part-{part:05d}-{row}"
