"""Loader module of registered encoders and models: MLflow calls `_load_pyfunc`, and what that returns predicts. No
MLflow, no Ray.

model = mlflow.pyfunc.load_model("models:/NAME/1")
model.predict(pandas.DataFrame({"path": ["patient_4d.nii.gz"], "acceleration": [8]}))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmtr.data.sources import read
from kmtr.encoder import load_encoder
from kmtr.exported import HEAD
from kmtr.inference import load_model
from kmtr.types import InputError, Study

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Served:
    """An encoder or model as MLflow asks it: a table of studies in, a table of what is said of them out.

    Args:
        say: study and R (None: all its lines) -> column -> what stands there.
    """

    say: Callable[[Study, int | None], dict[str, Any]]

    def predict(self, studies: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Numbers that a model predicts, a column each, or embeddings of an encoder (`embedding`, lists of numbers); a
        row for each study, in the order given.

        Args:
            studies: columns ``path`` (file or folder of one study, as this process sees it) and, optionally,
                ``acceleration`` (nominal R that is drawn; 0: all lines that the study has).

        Raises:
            InputError: a study that can't be read or doesn't fit, by its row.
        """
        rows = []
        accelerations = studies.get("acceleration", [0] * len(studies))
        for number, (path, acceleration) in enumerate(zip(studies["path"], accelerations, strict=True)):
            try:
                rows.append(self.say(read(str(path)), int(acceleration) or None))
            except InputError as error:
                raise InputError(f"row {number}: {error}") from None
        return studies[[]].assign(**{name: [row[name] for row in rows] for name in (rows[0] if rows else [])})


def _load_pyfunc(path: str) -> Served:
    """The encoder or model in a folder that `exported.export_encoder` or `exported.export_model` wrote."""
    if (Path(path) / HEAD).is_file():
        encoder = load_encoder(path)
        return Served(lambda study, r: {"embedding": encoder(study, r).tolist()})
    model = load_model(path)
    return Served(lambda study, r: {k: v for k, v in model.predict(study, r).items() if isinstance(v, float)})
