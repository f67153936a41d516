"""python jobs/simulate.py RECIPE [key=value ...]

Writes a simulated cohort to data.root, a path that all nodes reach or an object-store URI. Killed
at any time, the same command goes on behind the finished shards and ends with the same bytes.

examples:
  python jobs/simulate.py tiny
  python jobs/simulate.py base simulate.subjects=20000 simulate.difficulty=hard
"""

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
