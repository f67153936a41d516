"""python jobs/pretrain.py RECIPE [key=value ...]      stage=masked | align (default: both, one after the other)

The same command resumes an unfinished run and prints the result of a finished one; run.fresh=true starts anew."""

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
