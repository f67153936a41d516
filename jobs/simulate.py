"""python jobs/simulate.py RECIPE [key=value ...]      write a simulated cohort to data.root

data.root is a path that all nodes reach or an object-store URI. Killed at any time, the same command goes on behind the
finished shards and ends with the same bytes."""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import main, recipe_config


def run(words: list[str]) -> dict[str, Any]:
    from kmtr.data.dataset import simulate

    return simulate.run(recipe_config(words, __doc__ or ""))


if __name__ == "__main__":
    main(__doc__ or "", run)
