"""python jobs/pretrain.py RECIPE [key=value ...]

Pretrains an encoder: masked pretraining, then alignment; stage=masked or stage=align for one
alone. The same command resumes an unfinished run and prints the result of a finished one;
run.fresh=true starts anew.

examples:
  python jobs/pretrain.py tiny
  python jobs/pretrain.py tiny stage=masked masked.steps=400
  python jobs/pretrain.py base data.root=runs/mine train.workers=4
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import main, recipe_config


def run(words: list[str]) -> dict[str, Any]:
    from kmtr.train import pretrain

    return pretrain.run(recipe_config(words, __doc__ or ""))


if __name__ == "__main__":
    main(__doc__ or "", run)
