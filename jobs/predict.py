"""python jobs/predict.py MODEL data.root=... predict.out=... [key=value ...]

Predicts every subject of a dataset with a model that jobs/finetune.py left, on a CPU or GPUs. MODEL
is a folder (runs/<run>/model), or models:/NAME/VERSION, models:/NAME/latest or models:/NAME@ALIAS
of MLflow's registry. How a subject is seen (views, frames, matrix, sampling) the model says.

Killed at any time, the same command goes on behind the finished parts and ends with the same bytes.
Written to predict.out:

predictions/   a row per subject, R and number: pseudonym, true R, value, truth where it is known
embeddings/    the system's vectors (predict.embeddings=true)
masks/, ...    dense outputs, a folder each (predict.masks=true), and nifti/ for viewers
refused.json   subjects that could not be predicted, by pseudonym, and why

examples:
  python jobs/predict.py runs/RUN/model data.root=runs/mine predict.out=runs/out
  python jobs/predict.py models:/heart/latest predict.out=runs/out predict.accelerations=4,8
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import main


def run(words: list[str]) -> dict[str, Any]:
    from kmtr.evaluate import predict

    return predict.run(words)


if __name__ == "__main__":
    main(__doc__ or "", run)
