"""Predictions for held-out subjects as one Parquet file: evaluation and studies write it and make their tables of it.

A row is one number that one system says about one subject at one acceleration. Numbers that a system predicts stand
beside their truth; scores of dense outputs of a subject (Dice of a mask) have no truth. Subjects are named by their
pseudonyms, which stay in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float

from kmtr.config import RunConfig
from kmtr.data.dataset import storage
from kmtr.systems import input_of
from kmtr.types import InputError

FORMAT = 1
"""Number of the file's format; a file of another one is refused."""
FILE = "predictions.parquet"
_FORMAT_KEY = b"kmtr.predictions"

SCHEMA = pa.schema(
    [
        pa.field("subject", pa.string(), nullable=False),
        pa.field("acceleration", pa.int32(), nullable=False),
        pa.field("true_acceleration", pa.float64()),
        pa.field("system", pa.string(), nullable=False),
        pa.field("input", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("labels", pa.int64(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("truth", pa.float64()),
        pa.field("value", pa.float64(), nullable=False),
    ],
    metadata={_FORMAT_KEY: str(FORMAT)},
)
"""Columns: pseudonym; nominal R; R that was really acquired of this subject (null: not known); name of the system
and of its input; seed and number of the labelled subjects; name of the target; its truth (null: unknown, or a
score) and the system's value, both in the target's unit.
"""

KEY = ("subject", "acceleration", "system", "input", "seed", "labels", "target")
"""Columns that name a row: no two rows have the same."""

LINES, NOTHING, TRUE_PHENOTYPES = "acquired lines", "nothing", "true phenotypes"
_ON_MASKS, _BY_AREAS, _TOGETHER = ", masks", ", areas of masks", ", areas and head"


class Name(NamedTuple):
    """Name of a system and of its input."""

    system: str
    input: str

    @property
    def title(self) -> str:
        """The name in a table: the input is told where the system leaves it open."""
        return self.system if self.input in (LINES, NOTHING) else f"{self.system} on {self.input}"

    @property
    def measured(self) -> bool:
        """True for what was measured on a system's masks, which may not be possible of every subject."""
        return self.system.endswith((_ON_MASKS, _BY_AREAS, _TOGETHER))


TRAINED, UNTRAINED = Name("k-MTR encoder", LINES), Name("untrained encoder", LINES)
RIDGE, CENTRAL = Name("ridge", "low-res image"), Name("ridge", "central lines")
FINETUNED, FROM_SCRATCH = Name("k-MTR fine-tuned", LINES), Name("k-MTR from scratch", LINES)
SYSTEMS = {
    "image": "image encoder",
    "unet": "U-Net",
    "linet": "LI-Net-style",
    "resnet50": "ResNet-50",
    "xf": "x-f U-Net",
    "kgin": "k-GIN",
    "kmae": "KMAE-style",
}
INPUTS = {
    "acquired": LINES,
    "full": "full image",
    "zerofilled": "zero-filled image",
    "shared": "temporally shared image",
    "lowrank": "low-rank + sparse image",
}
"""Names in tables of `task.system` and of `task.input`."""


def model_name(config: RunConfig, from_scratch: bool) -> Name:
    """Name in tables of the model that a run on labels trains."""
    sees = input_of(config)
    if config.task.system != "kspace":
        return Name(SYSTEMS.get(config.task.system, config.task.system), INPUTS.get(sees, sees))
    patches = {"kspace": LINES, "zerofilled": "zero-filled patches", "both": "lines and zero-filled patches"}
    return Name((FROM_SCRATCH if from_scratch else FINETUNED).system, patches[config.model.encoder_inputs])


MEAN = Name("mean", NOTHING)
MEAN_MASK, MASK_RIDGE = Name("mean mask", NOTHING), Name("ridge", "temporally shared image")
ZEROFILLED, SHARED = Name("zero-filled image", LINES), Name("temporally shared image", LINES)
LOWRANK = Name("low-rank + sparse", LINES)

READ_OFF, CEILING = Name("phenotypes then disease", RIDGE.input), Name("ceiling, disease", TRUE_PHENOTYPES)
CEILINGS = frozenset({CEILING})
"""Systems that know what no input says: shown beside the others, and never a floor."""


def from_masks(name: Name) -> Name:
    """Name of the phenotypes that are measured on a system's masks."""
    return Name(f"{name.system}{_ON_MASKS}", name.input)


def by_areas(name: Name) -> Name:
    """Name of the phenotypes that a linear map makes of the areas of a system's masks (`metrics.areas`), and of the
    diseases that are read off these.
    """
    return Name(f"{name.system}{_BY_AREAS}", name.input)


def together(name: Name) -> Name:
    """Name of the phenotypes that a regression makes of what areas of a system's masks and its head say (`answers`)."""
    return Name(f"{name.system}{_TOGETHER}", name.input)


@dataclass(frozen=True)
class HeldOut:
    """Held-out subjects and the targets that systems are asked for.

    Attributes:
        subjects: pseudonyms, all different.
        truth: NaN where unknown.
    """

    subjects: tuple[str, ...]
    targets: tuple[str, ...]
    truth: Float[np.ndarray, "subject target"]

    def __getitem__(self, some: slice) -> HeldOut:
        return HeldOut(self.subjects[some], self.targets, self.truth[some])


def held_out_words(config: RunConfig, subjects: int) -> str:
    """Number of held-out subjects in words, and of those whose masks and images are scored."""
    dense = config.evaluate.dense
    return f"{subjects} held-out subjects{f' (masks and images: {dense} of them)' if 0 < dense < subjects else ''}"


def rows(
    name: Name,
    held_out: HeldOut,
    values: Float[np.ndarray, "subject target"],
    *,
    acceleration: int,
    seed: int,
    labels: int,
    true_acceleration: Float[np.ndarray, " subject"] | None = None,
) -> pa.Table:
    """Rows of one system at one acceleration, target by target; a NaN value is no row.

    Args:
        labels: number of labelled subjects that the system learnt from.
        true_acceleration: acceleration really acquired of each subject; None: not known.
    """
    count = len(held_out.subjects)
    true = np.full(count, np.nan) if true_acceleration is None else true_acceleration
    parts = []
    for number, target in enumerate(held_out.targets):
        value = np.asarray(values[:, number], np.float64)
        said = np.flatnonzero(np.isfinite(value))
        columns = {
            "subject": pa.array(held_out.subjects, pa.string()).take(pa.array(said)),
            "acceleration": np.full(len(said), acceleration, np.int32),
            "true_acceleration": _nullable(true[said]),
            "system": [name.system] * len(said),
            "input": [name.input] * len(said),
            "seed": np.full(len(said), seed),
            "labels": np.full(len(said), labels),
            "target": [target] * len(said),
            "truth": _nullable(held_out.truth[said, number]),
            "value": value[said],
        }
        parts.append(pa.Table.from_pydict(columns, schema=SCHEMA))
    return joined(parts)


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of all tables in their order; that each is there once is checked when they are written."""
    return pa.concat_tables([SCHEMA.empty_table(), *tables])


def write(path: Path, table: pa.Table) -> None:
    """Write a file of predictions, the whole of it or nothing.

    Raises:
        InputError: two rows have the same key.
    """
    content = encoded(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    store, base = storage.open_root(str(path.parent))
    storage.write_atomic(store, f"{base}/{path.name}", content)


def encoded(table: pa.Table) -> bytes:
    """Content of a file of predictions. Raises as `write`."""
    _check_keys(table, "what is to be written")
    sink = pa.BufferOutputStream()
    pq.write_table(table.cast(SCHEMA).replace_schema_metadata(SCHEMA.metadata), sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def append(path: Path, table: pa.Table) -> None:
    """Add rows to a file of predictions, or begin one.

    Raises:
        InputError: a row's key is in the file already, or the file is not one.
    """
    write(path, joined([read(path), table] if path.is_file() else [table]))


def read(path: Path) -> pa.Table:
    """The rows of a file of predictions, in their order, or of all files in a folder (`jobs/predict.py`).

    Raises:
        InputError: no such file; another format; columns, types or empty cells that the format does not have; two rows
            with the same key.
    """
    if path.is_dir():
        whole = joined([read(part) for part in sorted(path.glob("*.parquet"))])
        _check_keys(whole, str(path))
        return whole
    if not path.is_file():
        raise InputError(f"predictions: expected a file, got none at {path}; evaluate writes it")
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_schema(schema, path)
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"predictions: expected a Parquet file, got {storage.reason(error)}, in {path}; evaluate anew"
        ) from None
    for field in SCHEMA:
        if not field.nullable and table.column(field.name).null_count:
            raise InputError(f"predictions: expected a {field.name} in every row, got empty cells in {path}")
    _check_keys(table, str(path))
    return table.cast(SCHEMA)


def _check_schema(schema: pa.Schema, path: Path) -> None:
    found = (schema.metadata or {}).get(_FORMAT_KEY, b"none").decode("utf-8", "replace")
    if found != str(FORMAT):
        raise InputError(f"predictions: expected format {FORMAT}, got {found}, in {path}; evaluate anew")
    for field in SCHEMA:
        if schema.names.count(field.name) != 1:
            have = ", ".join(schema.names) or "none"
            raise InputError(f"predictions: expected the column {field.name} once, got {have}, in {path}")
        if schema.field(field.name).type != field.type:
            got = schema.field(field.name).type
            raise InputError(f"predictions: expected {field.name} as {field.type}, got {got}, in {path}")
    if len(schema) > len(SCHEMA):
        other = next(name for name in schema.names if name not in SCHEMA.names)
        raise InputError(f"predictions: expected no column {other!r}, got one in {path}")


def _check_keys(table: pa.Table, where: str) -> None:
    """Refuse a key that is there twice; the subject is not named."""
    if len(table) == 0:
        return
    counts = table.group_by(list(KEY)).aggregate([([], "count_all")])
    twice = counts.filter(pc.greater(counts.column("count_all"), 1)).slice(0, 1).to_pylist()
    if twice:
        key = ", ".join(f"{name} {twice[0][name]}" for name in KEY if name != "subject")
        raise InputError(
            f"predictions: expected each row once, got {twice[0]['count_all']} of one subject with {key} in {where}"
        )


def _nullable(values: np.ndarray) -> pa.Array:
    """Float64 with null for NaN."""
    return pa.array(np.asarray(values, np.float64), from_pandas=True)
