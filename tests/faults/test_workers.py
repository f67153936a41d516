"""One worker of a real run dies, stands still, hangs or raises: what becomes of the run."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import inject
import pytest
from inject import Fault, cases, plant
from survived import check_survived, run_of

from kmtr.config import RunConfig, override
from kmtr.train import driver
from kmtr.train.folder import Outcome
from kmtr.types import KmtrError

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("faults")]

SHORT = {("raises", inject.MIDDLE)}
"""Cases that run by default; a worker is killed in tests/train/test_training.py."""


WATCHED = {"stopped": {"train.silent_s": 20.0}, "hangs": {"train.hang_s": 20.0}}


@cases(SHORT, ("killed", "stopped", "hangs"))
def test_the_run_goes_on(
    deed: str,
    moment: str,
    cluster: None,
    config: RunConfig,
    calm: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault = Fault(moment, deed, str(tmp_path))
    plant(monkeypatch, fault)
    outcome = driver.fit(override(config, WATCHED.get(deed, {})))
    assert fault.happened.exists(), "nothing happened: the test proves nothing"
    check_survived(config, outcome, calm)
    said = capsys.readouterr().out
    assert re.search(r"lost          worker .*; all start again .*\(loss \d of at most 3\)", said)
    if deed == "stopped":
        assert "no sign of life of worker 1 for 20 s" in said
    if deed == "hangs":
        assert "no worker has finished anything for 20 s" in said
        assert "tests/faults" not in said
    if deed != "killed" and moment == inject.MIDDLE:
        assert re.search(r"worker 0 is waiting for the others at kmtr/train/\w+\.py:\d+", said)


@cases(SHORT, ("raises", "out of memory"))
def test_the_run_ends_with_the_first_error(
    deed: str, moment: str, cluster: None, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(moment, deed, str(tmp_path))
    plant(monkeypatch, fault)
    with pytest.raises(KmtrError, match="planted") as caught:
        driver.fit(config, quiet=True)
    sys.stdout.write(f"{time.time() - fault.happened.stat().st_mtime:.0f} s\n")
    assert "\n" not in str(caught.value)
    assert run_of(config)[1] == "FAILED"
