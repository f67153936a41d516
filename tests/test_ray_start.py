"""Which Ray a command uses, and that an address where nobody answers is said and given up, on a clock of the test's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kmtr import ray_start
from kmtr.types import KmtrError

ROOT = Path(__file__).parents[1]


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


def test_an_address_where_nobody_answers_is_said_once_and_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    clock, said_at = Clock(), []

    def listens(host: str, port: int) -> bool:
        assert (host, port) == ("head", 6379)
        said_at.extend([clock.seconds] * ("waiting" in capsys.readouterr().out))
        return False

    with pytest.raises(KmtrError, match=r"nothing answered at RAY_ADDRESS=head:6379 for 60 s; start") as error:
        ray_start.wait_for("head:6379", listens=listens, now=clock.now, sleep=clock.sleep)
    assert "\n" not in str(error.value)
    assert said_at == [6.0], "looked at after the second in which it was said"
    assert clock.seconds == ray_start.GIVE_UP_AFTER_S


def test_a_head_node_that_comes_late_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    come = ray_start.SAY_AFTER_S + 2
    ray_start.wait_for("ray://head:10001", listens=lambda *_: clock.seconds >= come, now=clock.now, sleep=clock.sleep)
    assert clock.seconds == come
    assert capsys.readouterr().out == "ray: waiting for ray://head:10001 (RAY_ADDRESS), up to 60 s\n"


@pytest.mark.parametrize("address", ["", "auto", "local"])
def test_only_an_address_with_a_port_is_waited_for(address: str) -> None:
    ray_start.wait_for(address, listens=lambda *_: pytest.fail("nobody is asked"))


def test_a_port_listens_or_does_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert ray_start.listens("127.0.0.1", port)
    assert not ray_start.listens("127.0.0.1", port)


@pytest.mark.ray
def test_an_empty_address_is_none(tmp_path: Path) -> None:
    code = "import os; from kmtr.ray_start import start_ray; start_ray(); print('RAY_ADDRESS' in os.environ)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"RAY_ADDRESS": "", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second, last = done.stdout.splitlines()
    assert first == "ray: starting on this machine"
    assert second.startswith("ray: 1 node(s)")
    assert last == "False"
