"""python jobs/send.py RECIPE [key=value ...]

Sends to MLflow what the runs in storage.root could not send while it was away: metrics, files and
how they ended. A line for each run that had something left; a run whose command is at work sends
by itself and is left alone. Exit status 1 if MLflow still lacks something.

examples:
  python jobs/send.py tiny
  python jobs/send.py tiny storage.root=/shared/runs tracking.uri=http://mlflow:5000
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import main, recipe_config


def run(words: list[str]) -> dict[str, Any]:
    from kmtr.train import send

    return send.run(recipe_config(words, __doc__ or ""))


if __name__ == "__main__":
    main(__doc__ or "", run, failed=lambda said: bool(said["left"]))
