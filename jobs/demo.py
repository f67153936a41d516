"""python jobs/demo.py RECIPE [key=value ...]

All main commands one after the other in one Ray session: a simulated cohort, pretraining,
evaluation of the frozen encoder, and a model fine-tuned for phenotypes, diseases, segmentation and
reconstruction beside what needs no network. The same command again goes on, or prints what is done.

examples:
  python jobs/demo.py tiny masked.steps=400 align.steps=80 task.steps=150 task.frames=1
  python jobs/demo.py tiny
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import evaluate, finetune, main, pretrain, simulate

TASKS = "task.tasks=phenotypes,diseases,segmentation,reconstruction"


def run(words: list[str]) -> dict[str, Any]:
    simulate.run(words)
    pretrain.run(words)
    return {"probed": evaluate.run(words), "tuned": finetune.run([*words[:1], TASKS, *words[1:]])}


if __name__ == "__main__":
    main(__doc__ or "", run)
