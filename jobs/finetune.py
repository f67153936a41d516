"""python jobs/finetune.py RECIPE task.tasks=TASK[,TASK ...] [key=value ...]

Trains light heads (phenotypes, diseases, segmentation, reconstruction) on a pretrained encoder,
and the encoder with them; then predicts the test split at every R beside floors that need no
network, and reports it in the run's folder: report.html, report.json, tables/*.csv. Starts from
the encoder of the finished pretraining with the same settings (masked.* and align.* say which),
from an encoder's folder (task.encoder=FOLDER) or from scratch (task.encoder=none). It learns from
all training subjects, or from the number in task.labels, and leaves the model of the best
validation, or with task.keep=last of the last step. The same command resumes an unfinished run and
prints the result of a finished one. The model is for
kmtr.load_model("runs/<run>/model").predict(study); its card is README.md in that folder, and
tracking.model=NAME makes it a new version in MLflow's registry.

examples:
  python jobs/finetune.py tiny task.tasks=phenotypes
  python jobs/finetune.py tiny task.tasks=phenotypes,diseases task.diseases=dcm,hcm
  python jobs/finetune.py tiny task.tasks=phenotypes task.encoder=none
  python jobs/finetune.py tiny task.tasks=phenotypes,segmentation,reconstruction task.frames=2
  python jobs/finetune.py tiny task.tasks=phenotypes task.labels=100 task.patience=5
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import main, recipe_config


def run(words: list[str]) -> dict[str, Any]:
    from kmtr.evaluate import finetune

    return finetune.run(recipe_config([*words[:1], "stage=task", *words[1:]], __doc__ or ""))


if __name__ == "__main__":
    main(__doc__ or "", run)
