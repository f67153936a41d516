"""python jobs/export.py nnunet [RECIPE] data.root=... export.out=... [key=value ...]

Writes a dataset as another program reads it. nnunet: the raw layout of nnU-Net v2, a case for each
view of each subject at end-diastole and end-systole, with the images that unet sees here
(export.input), so that nnU-Net itself can be trained beside the systems of jobs/study.py. Its
folds are the training and validation split; the test split lies in imagesTs and labelsTs. No file
names a subject. The same command writes the same bytes. Needs kmtr[readers].

Recipe: tiny, unless given.

examples:
  python jobs/export.py nnunet data.root=runs/tiny export.out=nnUNet_raw
  python jobs/export.py nnunet export.out=raw export.input=shared export.acceleration=8
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import main, recipe_config


def run(words: list[str]) -> dict[str, Any]:
    from kmtr.config.recipes import named
    from kmtr.evaluate import nnunet
    from kmtr.types import InputError

    what, *rest = words or [""]
    if what != "nnunet":
        raise InputError(f"export: expected what to write, nnunet, got {what!r}")
    if not rest or "=" in rest[0]:
        rest = [named("export", words), *rest]
    return nnunet.run(recipe_config(rest, __doc__ or ""))


if __name__ == "__main__":
    main(__doc__ or "", run)
