"""What the guard of alignment calls a loss."""

from __future__ import annotations

from kmtr.train.guard import fallen, probes

BEFORE = {
    "val/lvef_r2": 0.8,
    "val/probe_r2": 0.7,
    "val/lvef_r2_static": 0.9,
    "val/kspace_loss": 0.1,
    "masked/x": 1.0,
}


def test_probes_are_the_r2_of_the_whole_embedding() -> None:
    assert probes(BEFORE) == {"val/lvef_r2": 0.8, "val/probe_r2": 0.7}


def test_one_phenotype_that_falls_is_enough() -> None:
    after = {"val/lvef_r2": 0.6, "val/probe_r2": 0.72, "val/kspace_loss": 9.0, "val/lvef_r2_static": 0.0}
    lost = fallen(BEFORE, after, tolerance=0.03)
    assert lost.keys() == {"val/lvef_r2"}
    assert abs(lost["val/lvef_r2"] - 0.2) < 1e-9
    assert not fallen(BEFORE, after, tolerance=0.25)
    assert not fallen(BEFORE, {"val/kspace_loss": 9.0}, tolerance=0.0)  # nothing was probed
    assert not fallen({}, after, tolerance=0.0)  # no masked pretraining in this run


def test_a_metric_that_is_not_declared_stops_nothing() -> None:
    before = {"val/lvef_r2": 0.8, "val/lvef_r2_static": 0.8, "val/new_idea_r2": 0.9}
    assert probes(before) == {"val/lvef_r2": 0.8}
    assert fallen(before, {"val/lvef_r2": 0.8, "val/lvef_r2_static": 0.0, "val/new_idea_r2": 0.0}, 0.03) == {}
