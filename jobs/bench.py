"""python jobs/bench.py data [RECIPE] [key=value ...]      speed of reading beside other loaders, on the same bytes

data                                                   each loader's rate, first batch, longest wait, memory;
                                                       the recipe (base, unless given) says what a row is
data plan.subjects=10000000 [plan.world_size=1024]     no files: how long the plan of so many subjects takes
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import bench_data
from jobs._main import main, recipe_config
from kmtr.types import InputError

WHAT = {"data": bench_data.run}
LATER = ("step", "scale")


def run(words: list[str]) -> dict[str, Any]:
    what, *rest = words or [""]
    if what not in WHAT:
        state = "which is not built yet" if what in LATER else "which is none of them"
        raise InputError(f"bench: expected what to measure, one of {', '.join(WHAT)}, got {what!r}, {state}")
    if not rest or "=" in rest[0]:
        rest = ["base", *rest]
    return WHAT[what](recipe_config(rest, __doc__ or ""))


if __name__ == "__main__":
    main(__doc__ or "", run)
