"""python jobs/evaluate.py RECIPE [key=value ...]

Tables, figures and an HTML report of a pretrained encoder: ridge probes of frozen k-space
embeddings on held-out subjects, beside an untrained encoder, ridge on the zero-filled
low-resolution image, and predict-the-mean. Takes the encoder of the run with this configuration,
or evaluate.encoder; evaluate.encoder=none shows what a dataset gives away without any: linear
baselines for labels and masks. All tables come from one file, predictions.parquet beside the
report: a row per subject, R, system and target.

examples:
  python jobs/evaluate.py tiny
  python jobs/evaluate.py tiny evaluate.encoder=none
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import main, recipe_config


def run(words: list[str]) -> dict[str, Any]:
    from kmtr.evaluate import report

    return report.run(recipe_config(words, __doc__ or ""))


if __name__ == "__main__":
    main(__doc__ or "", run)
