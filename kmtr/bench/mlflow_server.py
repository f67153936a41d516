"""A real MLflow server on this machine that can be killed and started again on the same port and store."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from kmtr.types import KmtrError


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server:
    """A server on loopback.

    Args:
        folder: for its store, its artifacts and its log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it answers seconds later (`wait_until_up`)."""
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        files = ["--artifacts-destination", str(self.folder / "files")]
        with (self.folder / "server.log").open("a") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *store, *files, "--port", str(self.port), "--workers", "1"],
                cwd=self.folder,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )

    def wait_until_up(self, timeout_s: float = 120.0) -> None:
        """Return when it accepts connections.

        Raises:
            KmtrError: it does not; the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
                return
            except OSError:
                time.sleep(0.2)
        raise KmtrError(f"the MLflow server does not start: {(self.folder / 'server.log').read_text()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL it, with the workers of its session; nothing where it does not run."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
