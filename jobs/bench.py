"""python jobs/bench.py data [RECIPE] [key=value ...]
python jobs/bench.py step [RECIPE] [key=value ...]
python jobs/bench.py tracking [RECIPE] [key=value ...]
python jobs/bench.py search [RECIPE] [key=value ...]

data  speed of reading beside other loaders, on the same bytes: each loader's rate, first batch,
      longest wait, memory; the recipe (base, unless given) says what a row is. With
      bench.plan_subjects no files: how long the plan of so many subjects takes
step  speed of a training step beside the settings of ViTa and DDP: tokens/s, FLOPs, MFU, memory,
      time per part, cost against R, of the recipe (tiny, unless given), with random k-space
tracking
      cost of tracking to a step, with a real MLflow server that is killed and started again every
      ten steps (bench.pairs blocks of each kind), and whether it has all of it at the end
search
      cost of a search of one trial over its run alone: until the first step (bench.repeats of
      each), and of a step, in blocks of one run in which the search's processes are halted

examples:
  python jobs/bench.py data bench.peers=streaming
  python jobs/bench.py data bench.plan_subjects=10000000 bench.plan_workers=1024
  python jobs/bench.py step tiny
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import main, recipe_config


def run(words: list[str]) -> dict[str, Any]:
    from kmtr.bench import data, search, step, tracking
    from kmtr.config.recipes import named
    from kmtr.types import InputError

    kinds = {"data": data.run, "step": step.run, "tracking": tracking.run, "search": search.run}
    what, *rest = words or [""]
    if what not in kinds:
        state = "which is not built yet" if what == "scale" else "which is none of them"
        raise InputError(f"bench: expected what to measure, one of {', '.join(kinds)}, got {what!r}, {state}")
    if not rest or "=" in rest[0]:
        rest = [named("bench", words), *rest]
    return kinds[what](recipe_config(rest, __doc__ or ""))


if __name__ == "__main__":
    main(__doc__ or "", run)
