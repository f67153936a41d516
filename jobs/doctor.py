"""python jobs/doctor.py [RECIPE key=value ...]

Finds now what would fail later. Without RECIPE only the environment is checked: versions,
compiler, Ray. One line per check: ok, warn (it can run, but look), or FAIL with what to do. Exit
status 1 if anything FAILs.

examples:
  python jobs/doctor.py
  python jobs/doctor.py base train.workers=8
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import main, recipe_config


def run(words: list[str]) -> dict[str, Any]:
    from kmtr.doctor import run as checks

    return checks.run(recipe_config(words, __doc__ or "") if words else None)


if __name__ == "__main__":
    main(__doc__ or "", run, failed=lambda said: bool(said["failed"]))
