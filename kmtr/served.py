"""Loader module of registered models: MLflow calls `_load_pyfunc`, and what that returns predicts. No MLflow, no Ray.

model = mlflow.pyfunc.load_model("models:/NAME/1")
model.predict(pandas.DataFrame({"path": ["patient_4d.nii.gz"], "acceleration": [8]}))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kmtr.data.sources import read
from kmtr.inference import TaskModel, load_model
from kmtr.types import InputError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Served:
    """A model as MLflow asks it: a table of studies in, a table of predictions out."""

    model: TaskModel

    def predict(self, studies: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Numbers that the model predicts, a column each and a row for each study, in the order given.

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
                said = self.model.predict(read(str(path)), int(acceleration) or None)
            except InputError as error:
                raise InputError(f"row {number}: {error}") from None
            rows.append({name: value for name, value in said.items() if isinstance(value, float)})
        return studies[[]].assign(**{name: [row[name] for row in rows] for name in (rows[0] if rows else [])})


def _load_pyfunc(path: str) -> Served:
    """The model in a folder that `exported.export_model` wrote."""
    return Served(load_model(path))
