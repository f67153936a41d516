"""The k-space encoder on its own: exported by training, used without Ray, DeepSpeed or MLflow.

    encoder = kmtr.load_encoder("runs/<run>/encoder")
    embedding = encoder(study)                # numpy ``feature``

A folder of two files that hold no code: ``encoder.safetensors`` (weights and normalisation tables) and ``encoder.json``
(format, and the settings that rebuild it: data shapes, sampling, model, seed; no others, so that a new or dropped
key of a command makes no encoder unreadable).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from kmtr.config import RunConfig, override
from kmtr.data.dataset.record import Loaded, schema, to_row
from kmtr.data.loader import patterns
from kmtr.data.loader.batch import NOTHING, Batch, Wanted
from kmtr.data.loader.collate import collate
from kmtr.data.loader.device import HostBatch
from kmtr.exported import HEAD, KSPACE, UNFIT, WEIGHTS, check_weights, read_head, read_weights, system_of
from kmtr.physics import sampling
from kmtr.systems import system
from kmtr.types import InputError, Study, first_line


class KSpaceEncoder:
    """Frozen k-space encoder: acquired lines -> one embedding per subject (static and dynamic part of every slice)."""

    def __init__(
        self, config: RunConfig, weights: dict[str, Tensor] | None, tables: dict[str, Tensor], device: torch.device
    ):
        self.config, self.tables, self.device = config, tables, device
        with torch.random.fork_rng(devices=[]):  # the initial weights are those of training, the caller's state stays
            torch.manual_seed(config.seed)
            self.module = system("kspace").module(config).to(device).eval()
        if weights is not None:
            self.module.load_state_dict(weights)
        self.reader = system("kspace").reader(config, tables, device)

    @property
    def readout(self) -> int | None:
        """Central kx samples of a batch that are looked at; None: all."""
        return self.reader.readout

    @torch.no_grad()
    def embed(self, batch: Batch) -> Float[Tensor, "batch feature"]:
        """Embeddings from the lines that are `sampled`, fp32."""
        return self.learnable(batch)

    def features(self, batch: Batch) -> Float[np.ndarray, "batch feature"]:
        """`embed`, on the host: a source of features for probes."""
        found: np.ndarray = self.embed(batch).float().cpu().numpy()
        return found

    def learnable(self, batch: Batch, bf16: bool = False) -> Float[Tensor, "batch feature"]:
        """`embed` with a gradient to the module's weights, for training on labels.

        Args:
            bf16: the transformer under autocast; tokens and the embedding stay fp32.
        """
        with torch.no_grad():
            reading = self.reader(batch, learns=False).settle()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            features = self.module(*reading.arguments)
        vector: Tensor = features.vector
        return vector

    def __call__(self, study: Study, acceleration: int | None = None) -> np.ndarray:
        """Embedding of one study, float32 ``feature``.

        Args:
            acceleration: undersample by a pattern of the configured family (family file: its own R, rounded); None: use
                every line that the study has.

        Raises:
            InputError: the study lacks a view, or its matrix or coils are not those that the encoder was trained on.
        """
        batch = batch_of(study, self.config, acceleration).to(self.device)
        return self.embed(batch)[0].float().cpu().numpy()


def batch_of(study: Study, config: RunConfig, acceleration: int | None = None, wanted: Wanted = NOTHING) -> HostBatch:
    """A batch of one study, undersampled or as it is (see `KSpaceEncoder.__call__`).

    Raises:
        InputError: the study does not fit the configuration.
    """
    config = undersampled(config, acceleration)
    if wrong := misfit({name: view.kspace.shape for name, view in study.views.items()}, config):
        raise InputError(f"study: {wrong}")
    table = pa.Table.from_pylist([to_row(study, "float32")], schema=schema("float32"))
    return collate(Loaded(table), config, wanted=wanted, purpose=sampling.VALIDATION)


def undersampled(config: RunConfig, acceleration: int | None) -> RunConfig:
    """The settings of a batch at this R by a pattern of the configured family; None: with every line that there is.

    Raises:
        InputError: no such R of this family, or of this pattern file.
    """
    changes: dict[str, object] = {"sampling.accelerations": (acceleration or 1,)}
    changes["evaluate.accelerations"] = changes["sampling.accelerations"]
    if acceleration is None:  # every line, which no pattern file has
        changes |= {"sampling.family": "gaussian", "sampling.file": ""}
    config = override(config, changes)
    patterns.check(config)
    return config


def misfit(shapes: Mapping[str, Sequence[int]], config: RunConfig) -> str:
    """Reason why a subject can't be read with these settings, in one line; empty: it can.

    Args:
        shapes: view -> ``slice coil t ky kx``.
        config: of one R (`undersampled`).
    """
    data, how, table = config.data, config.sampling, patterns.table(config.sampling)
    for name in data.views:
        if name not in shapes:
            return f"expected the views {','.join(data.views)}, got no {name}"
        shape = tuple(shapes[name])
        larger = shape[3] > data.matrix[0] or shape[4] > data.matrix[1]
        if shape[1] > data.coils or (larger and not data.crop):
            return f"expected {name} with at most {data.coils} coils and matrix {data.matrix}, got axes {shape}"
        lines = data.matrix[0] if data.crop else shape[3]
        try:
            if table is None:
                sampling.check(lines, how.accelerations[0], how.acs_lines, how.family)
            else:
                patterns.check_lines(table, name, lines)
        except InputError as error:
            return str(error)
    return ""


def load_encoder(path: str | Path, device: str = "cpu", untrained: bool = False) -> KSpaceEncoder:
    """The encoder in a folder that `export_encoder` wrote.

    Args:
        untrained: keep the initial weights instead (same architecture, same normalisation): a baseline.

    Raises:
        InputError: no encoder there, or its files do not fit each other.
    """
    folder = Path(path)
    if not (folder / WEIGHTS).is_file() or not (folder / HEAD).is_file():
        raise InputError(f"encoder: expected a folder with {WEIGHTS} and {HEAD}, got {folder}")
    try:
        config = read_head(folder / HEAD)
        if (other := system_of(folder / HEAD)) != KSPACE:
            raise InputError(f"encoder: expected one of k-space, got one of {other} in {folder}")
        weights, tables = read_weights(folder / WEIGHTS, device)
        check_weights(lambda: system("kspace").module(config), weights)
        return KSpaceEncoder(config, None if untrained else weights, tables, torch.device(device))
    except InputError:
        raise
    except UNFIT as error:
        raise InputError(f"encoder: {folder} does not hold one: {first_line(error)}") from None


def embed_all(encoder: KSpaceEncoder, batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings ``subject feature`` and labels ``subject label`` of many batches."""
    pairs = [(encoder.features(b), b.labels.cpu().numpy()) for b in batches]
    return np.concatenate([x for x, _ in pairs]), np.concatenate([y for _, y in pairs])
