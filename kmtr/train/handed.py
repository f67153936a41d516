"""Findings that the driver of a run hands to its workers, so that none searches or reads it again."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Int

from kmtr.config import RunConfig
from kmtr.data.dataset.reader import Dataset
from kmtr.data.loader import patterns, planning
from kmtr.data.loader.buckets import Buckets
from kmtr.data.loader.order import Plan


def handed(config: RunConfig, dataset: Dataset, rows: Int[np.ndarray, " chosen"] | None = None) -> dict[str, Any]:
    """The resolved run for its workers (`taken`): ``buckets``, plain; ``pattern``, numpy ``frame line`` or None;
    ``rows`` as given.

    Args:
        rows: of the training split, that are trained on alone (`start.budget`).

    Raises:
        InputError: the dataset can't feed this configuration.
    """
    chosen = planning.plan_of(config, dataset, rows=rows).buckets
    assert chosen is not None
    return {"buckets": asdict(chosen), "pattern": patterns.carried(config.sampling), "rows": rows}


def taken(config: RunConfig, dataset: Dataset, given: dict[str, Any]) -> Plan:
    """The plan of a run in a worker, out of what it was `handed`: nothing is searched, and no pattern file is read.

    Raises:
        KmtrError: the dataset isn't the one that the run was resolved with.
    """
    patterns.hold(config.sampling, given["pattern"])
    found = given["buckets"]
    chosen = Buckets(tuple(map(tuple, found["shapes"])), tuple(found["of_class"]), found["overflow"])
    return planning.plan_of(config, dataset, chosen, given["rows"])
