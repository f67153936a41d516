"""A command on the Ray of the tests that is killed half way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable


def killed_when(ready: Callable[[], bool], command: list[str]) -> None:
    """Run a job and kill -9 it as soon as it is `ready`."""
    import ray

    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    running = subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        while not ready():
            assert running.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
    finally:
        running.send_signal(signal.SIGKILL)
        running.communicate()
    assert running.returncode == -signal.SIGKILL
