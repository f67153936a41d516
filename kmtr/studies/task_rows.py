"""Finished rows of the study of tasks, in a folder small enough to commit.

    rows.jsonl                                          a line of JSON per row: what was trained, and its scores
    <digest>-<seed>-<start>-<tasks>-<labels>.parquet    its values of the held-out subjects, for paired comparisons
    <digest>-<seed>-<start>-<tasks>-<labels>-shown.parquet    of the first seed what figures show of a few (`pictures`)

Held-out subjects are named by their place in the test split. What is shown are masks and images of three of them: where
the cohort is of people, they are no more to be passed on than the data. Values are float16 (a relative error below
0.05 %), those of diseases, whose ranks count, float32: with three R and 1,000 subjects about 80 kB a row of four tasks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from kmtr.files import one_at_a_time, write_atomic
from kmtr.types import DISEASES, InputError

FILE, SHOWN = "rows.jsonl", "-shown.parquet"
PRETRAINED, SCRATCH, FLOORS = "pretrained", "scratch", "floors"
"""Starts of a row: from the pretrained encoder, from initial weights; floors have no network that is trained."""

Values = Mapping[str, Float[np.ndarray, "acceleration subject"]]
"""Target -> what was said of the held-out subjects, ascending in their places; NaN: nothing."""


Shown = Mapping[str, np.ndarray]
"""Arrays that figures show, by their names; none are objects."""


class Asked(NamedTuple):
    """Key of a row.

    Attributes:
        labels: number of labelled subjects; 0: all.
    """

    seed: int
    start: str
    tasks: tuple[str, ...]
    labels: int

    @property
    def title(self) -> str:
        return f"seed {self.seed}, {self.start}, {'+'.join(self.tasks)}, {self.labels or 'all'} labels"


@dataclass(frozen=True)
class Rows:
    """The rows of one study in a folder, which may hold those of others.

    Attributes:
        digest: of the study's settings.
        accelerations: nominal R of all values.
        places: of the held-out subjects in the test split, ascending.
        bound: settings that decide rows of bounds beside `digest`; such a row of others is left out.
        decided: start -> what decides its rows besides, as they hold it.
    """

    folder: Path
    digest: str
    accelerations: tuple[int, ...]
    places: tuple[int, ...]
    bound: Mapping[str, Any] = field(default_factory=dict)
    decided: Callable[[str], Mapping[str, Any]] = lambda start: {}

    def read(self, tell: bool = False) -> dict[Asked, dict[str, Any]]:
        """The finished rows. Those of other settings are left out, and those whose values are missing.

        Args:
            tell: what is left out, a line for each reason.

        Raises:
            InputError: a line that is no row, or a file where the folder should be.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"study.rows: expected a folder, got the file {self.folder}")
        found: dict[Asked, dict[str, Any]] = {}
        others = 0
        for number, line in enumerate(self._lines(), 1):
            try:
                row = json.loads(line)
                asked = Asked(row["seed"], row["start"], tuple(row["tasks"]), row["labels"])
                mine = row["digest"] == self.digest and row.get("bound", self.bound) == self.bound
                mine = mine and self.decided(asked.start).items() <= row.items()
            except (json.JSONDecodeError, KeyError, TypeError):
                raise InputError(
                    f"study.rows: expected a row as JSON, got {line[:40]!r} in line {number} of {self.folder / FILE}; "
                    "remove that line, and its row is made anew"
                ) from None
            others += not mine
            if mine:
                found[asked] = row
        lost = [asked for asked in found if not self._path(asked).is_file()]
        if tell and others:
            print(f"study: {self.folder / FILE} holds {others} row(s) of other settings, which are left out")
        for asked in lost if tell else ():
            print(f"study: {asked.title}: its file of values is missing in {self.folder}, so it counts as not done")
        return {asked: row for asked, row in found.items() if asked not in lost}

    def add(self, asked: Asked, said: Mapping[str, Any], values: Values, shown: Shown | None = None) -> None:
        """Keep a finished row, in place of one of its key: its values first, so that a row that is there has them.
        Studies of other settings may add to the same folder meanwhile.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(self.folder):
            self._add(asked, said, values, shown)

    def _add(self, asked: Asked, said: Mapping[str, Any], values: Values, shown: Shown | None) -> None:
        key = {"digest": self.digest, **json.loads(json.dumps(asked._asdict()))}
        others = [line for line in self._lines() if not key.items() <= json.loads(line).items()]
        if len(others) < len(self._lines()):
            write_atomic(self.folder / FILE, "".join(f"{one}\n" for one in others))
        if shown:
            write_atomic(self._path(asked, SHOWN), _as_file(_of_arrays(shown)))
        write_atomic(self._path(asked), self._encoded(values))
        line = json.dumps(key | dict(said), allow_nan=False, separators=(",", ":"))
        write_atomic(self.folder / FILE, "".join(f"{one}\n" for one in [*others, line]))

    def values(self, asked: Asked) -> Values:
        """Values of a finished row, float64.

        Raises:
            InputError: the file is damaged, or of other subjects or R.
        """
        path = self._path(asked)
        try:
            table = pq.read_table(path)
            here = [table.column(name).to_numpy() for name in ("R", "place")]
            targets = [name for name in table.column_names if name not in ("R", "place")]
            same = all(map(np.array_equal, here, self._index()))
        except (pa.ArrowException, KeyError, OSError):
            same = False
        if not same:
            raise InputError(
                f"study.rows: expected values of {len(self.places)} held-out subjects at R = "
                f"{', '.join(map(str, self.accelerations))}, got other content in {path}; remove the file, and its row "
                "is made anew"
            )
        shape = len(self.accelerations), len(self.places)
        return {name: table.column(name).to_numpy().astype(np.float64).reshape(shape) for name in targets}

    def shown(self, asked: Asked) -> Shown:
        """Arrays that a finished row shows; empty: it kept none.

        Raises:
            InputError: the file is damaged.
        """
        path = self._path(asked, SHOWN)
        if not path.is_file():
            return {}
        try:
            return _arrays(pq.read_table(path))
        except (pa.ArrowException, KeyError, OSError, TypeError, ValueError):
            raise InputError(
                f"study.rows: expected what a row shows, got other content in {path}; remove the file, and figures go "
                "without it"
            ) from None

    def _path(self, asked: Asked, ending: str = ".parquet") -> Path:
        labels = asked.labels or "all"
        return self.folder / f"{self.digest}-{asked.seed}-{asked.start}-{'+'.join(asked.tasks)}-{labels}{ending}"

    def _lines(self) -> list[str]:
        path = self.folder / FILE
        return [line for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """R and place of each row of a file."""
        r, place = np.meshgrid(self.accelerations, self.places, indexing="ij")
        return r.ravel().astype(np.int32), place.ravel().astype(np.int32)

    def _encoded(self, values: Values) -> bytes:
        r, place = self._index()
        columns = {"R": pa.array(r), "place": pa.array(place)}
        for name, value in values.items():
            columns[name] = pa.array(value.ravel().astype(np.float32 if name in DISEASES else np.float16))
        coding = {"R": "DELTA_BINARY_PACKED", "place": "DELTA_BINARY_PACKED"}
        coding |= dict.fromkeys(values, "BYTE_STREAM_SPLIT")
        return _as_file(pa.table(columns), column_encoding=coding, store_schema=False)


def _of_arrays(shown: Shown) -> pa.Table:
    """Arrays as rows: name, type, shape, bytes."""
    columns = {"name": list(shown), "type": [str(one.dtype) for one in shown.values()]}
    shapes = pa.array([list(one.shape) for one in shown.values()], pa.list_(pa.int64()))
    content = pa.array([np.ascontiguousarray(one).tobytes() for one in shown.values()], pa.binary())
    return pa.table({name: pa.array(values) for name, values in columns.items()} | {"shape": shapes, "bytes": content})


def _arrays(table: pa.Table) -> dict[str, np.ndarray]:
    """Inverse of `_of_arrays`; numbers alone.

    Raises:
        ValueError: another type, or bytes that do not fill the shape.
    """
    found = {}
    for row in table.to_pylist():
        if np.dtype(row["type"]).kind not in "uif":
            raise ValueError(f"type: expected numbers, got {row['type']}")
        found[row["name"]] = np.frombuffer(row["bytes"], row["type"]).reshape(row["shape"])
    return found


def _as_file(table: pa.Table, **more: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", compression_level=19, use_dictionary=False, write_statistics=False, **more
    )
    content: bytes = sink.getvalue().to_pybytes()
    return content
