"""Training on labels by Ray Train's own workers and Ray Data's readers: together what other tests hold apart, Ray in
pretraining, labels on forked workers, and the columns that a task wants through either loader.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cohort import simulated
from test_finetune import DISEASES, TARGETS, config, on_labels  # noqa: F401  # config is a fixture

import kmtr
from kmtr.config import RunConfig, override
from kmtr.evaluate import finetune


@pytest.mark.full
@pytest.mark.ray
def test_the_command_on_ray(cluster: None, config: RunConfig, tmp_path: Path) -> None:  # noqa: F811
    """Ray Train's own workers and Ray Data's readers, sharded; labels go through the readers."""
    changes = {"data.loader": "ray", "storage.root": str(tmp_path), "train.zero_stage": 2, "seed": 1}
    done = finetune.run(override(on_labels(config, steps=2), changes))
    assert done["metrics"].keys() >= {"lvedv_r2", "dcm_auroc"}
    assert np.isfinite(list(done["metrics"].values())).all()
    assert kmtr.load_model(done["model"]).predict(simulated(33, config)).keys() == {*TARGETS, *DISEASES}
