"""Studies whose rows are made in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from forked_workers import instead_of_ray_train

from kmtr.studies import hands, running, tasks
from kmtr.studies.hands import Finished, Make, Needs
from kmtr.studies.task_rows import Asked
from kmtr.studies.task_study import Study


def one_by_one(study: Study, rows: Sequence[Asked], make: Make, needs: Callable[[Asked], Needs]) -> Iterator[Finished]:
    """`hands.side_by_side` with this process for a hand."""
    left = list(rows)
    while left:
        asked = hands.ready(left, {one: needs(one) for one in left}, [])
        assert asked is not None, "rows wait for each other"
        left.remove(asked)
        yield make(study, asked, study.rows.read())


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows one after the other, each trained by forked processes."""

    def nothing(*_: Any) -> None: ...

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(running, "start_ray", nothing)
    monkeypatch.setattr(tasks, "start_ray", nothing)
    monkeypatch.setattr(hands, "at_once", lambda _: 1)
    monkeypatch.setattr(hands, "side_by_side", one_by_one)
    instead_of_ray_train(monkeypatch)
