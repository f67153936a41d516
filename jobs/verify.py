"""python jobs/verify.py RECIPE [key=value ...]

Verifies a dataset: its bytes, its content, and the order of training. Reads all shards whole:
SHA-256, page checksums. Each damaged file is one line (file, row group, remedy), and exit status
1. Then looks at what the bytes say: schema and counts, finite values, the energy of k-space
against the image's, labels in their units, segmentations and what they make of the volumes,
subjects that come twice or in two splits. What is wrong ends with status 1, what is doubtful is
said. A contact sheet of random subjects and histograms of all labels are drawn under storage.root.
Last it proves the order of training: each subject once an epoch, the same global batches and as
many steps at every number of workers (verify.workers), the same again from any cursor.

examples:
  python jobs/verify.py tiny
  python jobs/verify.py tiny data.root=runs/mine verify.workers=1,2,4
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import main, recipe_config


def run(words: list[str]) -> dict[str, Any]:
    from kmtr.doctor import verify

    return verify.run(recipe_config(words, __doc__ or ""))


if __name__ == "__main__":
    main(__doc__ or "", run)
