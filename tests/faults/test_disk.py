"""The disk of a real run fills up: one line that names it, nothing half written that looks whole, and the same command
goes on when there is room again.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import inject
import pytest
from inject import Fault, meanwhile, plant
from survived import check_survived, run_of

from kmtr.config import RunConfig, override
from kmtr.train import driver
from kmtr.train.folder import Outcome
from kmtr.types import KmtrError

pytestmark = [pytest.mark.ray, pytest.mark.full, pytest.mark.xdist_group("faults")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MB in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a disk in memory can't be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> None:
    with (place / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


@pytest.mark.parametrize("moment", [inject.FIRST, inject.MIDDLE, inject.LAST])
def test_a_disk_that_fills_up_ends_the_run_in_one_line(
    moment: str,
    cluster: None,
    config: RunConfig,
    calm: Outcome,
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = override(
        config, {"storage.root": str(small_disk / "runs"), "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"}
    )
    fault = Fault(moment, "outside", str(tmp_path))
    with monkeypatch.context() as patch:
        plant(patch, fault)
        refused = pytest.raises(KmtrError, match=r"storage\.root: no room left in .*/disk/runs/")
        with meanwhile(fault, lambda: fill(small_disk)), refused as caught:
            driver.fit(config, quiet=True)
    assert "\n" not in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert run_of(config)[1] in ("FAILED", "RUNNING"), "the spool had no room either"
    (small_disk / "filler").unlink()
    outcome = driver.fit(config, quiet=True)
    assert outcome.metrics == pytest.approx(calm.metrics, rel=1e-6)
    if moment == inject.LAST:
        check_survived(config, outcome, calm)
