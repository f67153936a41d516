"""python jobs/bench.py data [RECIPE] [key=value ...]      speed of reading beside other loaders, on the same bytes
python jobs/bench.py step [RECIPE] [key=value ...]      speed of a training step beside the lab's settings and DDP

data                                                   each loader's rate, first batch, longest wait, memory;
                                                       the recipe (base, unless given) says what a row is
data bench.plan_subjects=10000000 [bench.plan_workers=1024]     no files: how long the plan of so many subjects takes
step                                                   tokens/s, FLOPs, MFU, memory, time per part, cost against R, of
                                                       the recipe (tiny, unless given), with random k-space
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import bench_data, bench_step
from jobs._main import main, recipe_config
from kmtr.types import InputError

WHAT = {"data": (bench_data.run, "base"), "step": (bench_step.run, "tiny")}
"""What is measured, and the recipe where none is given."""

LATER = ("scale",)


def run(words: list[str]) -> dict[str, Any]:
    what, *rest = words or [""]
    if what not in WHAT:
        state = "which is not built yet" if what in LATER else "which is none of them"
        raise InputError(f"bench: expected what to measure, one of {', '.join(WHAT)}, got {what!r}, {state}")
    measure, recipe = WHAT[what]
    if not rest or "=" in rest[0]:
        rest = [recipe, *rest]
    return measure(recipe_config(rest, __doc__ or ""))


if __name__ == "__main__":
    main(__doc__ or "", run)
