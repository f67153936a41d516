"""python jobs/ingest.py FORMAT SOURCE [key=value ...]

Reads files of a FORMAT (nifti, dicom, cmrxrecon or ismrmrd) and writes a dataset to data.root.

SOURCE is a file or a folder of them. Subjects get pseudonyms by a keyed hash; KMTR_SUBJECT_KEY is
the key (keep it: the same key gives the same pseudonyms). Fewer than 20 subjects are not split
(shards.split).

A subject that can't be read is refused and listed in refused.json beside the data, by its
pseudonym; the others go on. So are notes on subjects that were read, and the files of SOURCE that
belong to no subject, by number. Killed at any time, the same command goes on behind the finished
shards and ends with the same bytes.

When subjects were added to SOURCE, write it to another folder with shards.split_from=OLD_DATASET:
whoever was in that one keeps the split, so that nobody moves between training and test.

ingest.labels=TABLE (CSV or Parquet) joins phenotypes, diseases and covariates by the source's own
name of a subject, before the pseudonym; ingest.columns says which column is which. They go before
what contours tell.

examples:
  python jobs/ingest.py dicom FOLDER data.root=runs/mine ingest.labels=labels.csv
  python jobs/ingest.py ismrmrd FOLDER data.root=runs/raw ingest.coils=8
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import main


def run(words: list[str]) -> dict[str, Any]:
    from kmtr.data.dataset import ingest

    return ingest.run(words)


if __name__ == "__main__":
    main(__doc__ or "", run)
