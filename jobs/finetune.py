"""python jobs/finetune.py RECIPE task.tasks=phenotypes[,diseases] [key=value ...]

Trains light heads on a pretrained encoder, and the encoder with them, on labels; then predicts
the test split at every R beside the mean and a ridge on the low-resolution image. Starts from the
encoder of the finished pretraining with the same settings (masked.* and align.* say which), from
task.encoder=FOLDER, or from scratch with task.encoder=none; on all labels or those of task.labels
subjects. The same command resumes an unfinished run and prints the result of a finished one. The
model that it leaves, of the best validation or the last step (task.keep):
kmtr.load_model("runs/<run>/model").predict(study).

examples:
  python jobs/finetune.py tiny task.tasks=phenotypes
  python jobs/finetune.py tiny task.tasks=phenotypes,diseases task.diseases=dcm,hcm
  python jobs/finetune.py tiny task.tasks=phenotypes task.encoder=none
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
