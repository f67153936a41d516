"""The k-space encoder on its own: exported by training, used without Ray, DeepSpeed or MLflow.

    encoder = kmtr.load_encoder("runs/<run>/encoder")
    embedding = encoder(study)                # numpy ``feature``

A folder of two files that hold no code: ``encoder.safetensors`` (weights and normalisation tables) and ``encoder.json``
(format, and the settings that rebuild it: data shapes, sampling, model, seed; no others, so that a new or dropped
key of a command makes no encoder unreadable).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from kmtr.config import RunConfig, override, plain
from kmtr.data.dataset.record import Loaded, schema, to_row
from kmtr.data.loader import patterns
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.collate import collate
from kmtr.files import replacing, write_atomic
from kmtr.physics import sampling
from kmtr.systems import system
from kmtr.types import InputError, Study, first_line

WEIGHTS, HEAD = "encoder.safetensors", "encoder.json"
FORMAT = 1
"""Format of an encoder's folder; one of another format is refused."""
_SHAPES = {f"data.{name}" for name in ("views", "sax_slices", "frames", "matrix", "coils", "crop")}


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
        data = self.config.data
        changes: dict[str, object] = {"sampling.accelerations": (acceleration or 1,)}
        if acceleration is None:  # every line, which no pattern file has
            changes |= {"sampling.family": "gaussian", "sampling.file": "", "evaluate.accelerations": (1,)}
        config = override(self.config, changes)
        patterns.check(config)
        how, table = config.sampling, patterns.table(config.sampling)
        for name in data.views:
            if name not in study.views:
                raise InputError(f"study: expected the views {','.join(data.views)}, got no {name}")
            shape = study.views[name].kspace.shape
            larger = shape[3] > data.matrix[0] or shape[4] > data.matrix[1]
            if shape[1] > data.coils or (larger and not data.crop):
                raise InputError(
                    f"study: expected {name} with at most {data.coils} coils and matrix {data.matrix}, got axes {shape}"
                )
            lines = data.matrix[0] if data.crop else shape[3]
            if table is None:
                sampling.check(lines, acceleration or 1, how.acs_lines, how.family)
            else:
                patterns.check_lines(table, name, lines)
        table = pa.Table.from_pylist([to_row(study, "float32")], schema=schema("float32"))
        batch = collate(Loaded(table), config, purpose=sampling.VALIDATION).to(self.device)
        return self.embed(batch)[0].float().cpu().numpy()


def export_encoder(folder: Path, config: RunConfig, weights: dict[str, Tensor], tables: dict[str, Tensor]) -> None:
    """Write an encoder folder; `weights` of `model.encoder.line_encoder`, `tables` of the statistics."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {f"weights.{k}": v.contiguous() for k, v in weights.items()}
    content |= {f"tables.{k}": torch.view_as_real(v) if v.is_complex() else v for k, v in tables.items()}
    (folder / HEAD).unlink(missing_ok=True)  # written last: a folder that has it is whole
    with replacing(folder / WEIGHTS) as temporary:
        safetensors.torch.save_file({k: v.contiguous() for k, v in content.items()}, temporary)
    head = {"format": FORMAT, "settings": {key: value for key, value in plain(config).items() if _rebuilds(key)}}
    write_atomic(folder / HEAD, json.dumps(head, indent=2))


def _rebuilds(key: str) -> bool:
    return key == "seed" or key in _SHAPES or key.startswith(("sampling.", "model."))


def _read_head(path: Path) -> RunConfig:
    """The settings that an encoder was exported with; all others have their defaults.

    Raises:
        InputError: another format, or a setting that this version does not know.
    """
    try:
        head = json.loads(path.read_text())
        written, settings = head.get("format"), head.get("settings")
    except (ValueError, AttributeError):
        raise InputError(f"encoder: expected JSON with format and settings in {path}, got something else") from None
    if written != FORMAT or not isinstance(settings, dict):
        raise InputError(f"encoder: expected format {FORMAT}, got {written}, in {path}; export it anew")
    scored = {"evaluate.accelerations": settings.get("sampling.accelerations", (1,))}
    return override(RunConfig(), settings | scored)


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
    config = _read_head(folder / HEAD)
    try:
        content = safetensors.torch.load_file(folder / WEIGHTS, device=device)
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "tables": {}}
        for name, tensor in content.items():
            kind, _, key = name.partition(".")
            parts[kind][key] = tensor
        tables = parts["tables"] | {"static_mean": torch.view_as_complex(parts["tables"]["static_mean"].contiguous())}
        weights = None if untrained else parts["weights"]
        return KSpaceEncoder(config, weights, tables, torch.device(device))
    except (safetensors.SafetensorError, KeyError, RuntimeError) as error:
        raise InputError(f"encoder: {folder} does not hold one: {first_line(error)}") from None


def embed_all(encoder: KSpaceEncoder, batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings ``subject feature`` and labels ``subject label`` of many batches."""
    pairs = [(encoder.features(b), b.labels.cpu().numpy()) for b in batches]
    return np.concatenate([x for x, _ in pairs]), np.concatenate([y for _, y in pairs])
