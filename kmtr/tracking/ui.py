"""MLflow server over a local store, and the page to open it on. ``python -m kmtr.tracking.ui FOLDER PORT``"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from pathlib import Path

from kmtr.tracking.store import client

EXPERIMENT = "kmtr"
"""The default of `tracking.experiment`."""


def page(address: str, experiments: dict[str, str]) -> str:
    """Address of the runs of an experiment. Without ``workflowType`` MLflow 3.17 opens an experiment on the traces of
    language models, whatever its tags say (its pages read nothing else but a setting of the browser).

    Args:
        address: of the server.
        experiments: name -> id.
    """
    known = experiments.get(EXPERIMENT) or next(iter(experiments.values()), None)
    place = f"experiments/{known}/runs" if known else "experiments"
    return f"{address}/#/{place}?workflowType=machine_learning"


def main() -> None:
    """Serve until Ctrl-C."""
    folder, port = Path(sys.argv[1]).absolute(), int(sys.argv[2])
    store = f"sqlite:///{folder / 'mlflow.db'}"
    (folder / "artifacts").mkdir(parents=True, exist_ok=True)
    found = {one.name: one.experiment_id for one in client(store).search_experiments()}
    address = f"http://127.0.0.1:{port}"
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server ends with this process
    server = subprocess.Popen(words)
    try:
        while server.poll() is None and not _answers(address):
            time.sleep(0.2)
        if server.poll() is None:
            print(f"\n  MLflow    {page(address, found)}\n", flush=True)
            if os.environ.get("DISPLAY") or sys.platform == "darwin":
                webbrowser.open(page(address, found))
        sys.exit(server.wait())
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        server.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    main()
