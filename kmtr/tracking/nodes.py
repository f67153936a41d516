"""Readings of the nodes of a run in MLflow: CPU, memory, network, GPUs, by MLflow's collectors under its names
(``system/node0/cpu_utilization_percentage``), through a spool of each node's own.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kmtr.tracking.spool import Spool, replay, unsent
from kmtr.tracking.store import brief, prepare
from kmtr.types import KmtrError

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

log = logging.getLogger(__name__)

SPOOL = "spool-node"
"""Beginning of the folder of a node's spool, beside that of its run; the node's number follows."""
SHOWN = re.compile(
    r"cpu_utilization_percentage|system_memory_usage_megabytes|network_\w+_megabytes|"
    r"gpu_\d+_(utilization_percentage|memory_usage_megabytes|power_usage_watts)"
)
"""Metrics that are kept, one for each quantity: MLflow tells many twice, in megabytes and as a percentage."""
LEAVE_S = 2.0
"""Time in which a worker that ends sends its last readings; what is left its driver sends (`send_rest`)."""


@contextmanager
def readings(run: Path, uri: str, run_id: str, node: int, every_s: float) -> Iterator[None]:
    """Inside, a thread reads this node every `every_s` seconds: for one process of each node.

    The step of a reading is its number, which goes on after a restart. What fails is told once, in the log, and costs
    training nothing.

    Args:
        run: folder of the run.
        uri: the MLflow store.
        node: number of this node in the run.
    """
    wake = threading.Event()

    def read() -> None:
        spool: Spool | None = None
        try:
            spool = Spool(run / f"{SPOOL}{node}", uri, run_id, log.debug)  # the run's own spool tells of an outage
            collectors = _collectors()
            step = spool.reached + 1
            while not wake.wait(every_s):
                spool.metrics(step, {f"system/node{node}/{name}": value for name, value in _read(collectors).items()})
                step += 1
        except Exception as error:  # whatever it is, training goes on
            log.warning("tracking: no readings of node %d any more: %s", node, brief(error))
        finally:
            if spool is not None:
                spool.close(LEAVE_S)

    thread = threading.Thread(target=read, name="kmtr-node", daemon=True)
    thread.start()
    try:
        yield
    finally:
        wake.set()
        thread.join(2 * LEAVE_S)


def send_rest(run: Path, uri: str, timeout_s: float) -> int:
    """Send what the nodes of a run have read and not sent; after `timeout_s` nothing more is begun.

    Returns:
        Number of records that are left.
    """
    left, deadline = 0, time.monotonic() + timeout_s
    for spool in sorted(run.glob(f"{SPOOL}*")):
        remaining = deadline - time.monotonic()
        try:
            left += replay(spool, uri, remaining) if unsent(spool) and remaining > 0 else unsent(spool)
        except KmtrError as error:
            log.warning("tracking: %s", error)
            left += unsent(spool)
    return left


def _collectors() -> list[BaseMetricsMonitor]:
    """MLflow's collectors of what this node has; one that fails is left out, which the log says."""
    prepare()
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    kinds: tuple[type[BaseMetricsMonitor], ...] = (CPUMonitor, NetworkMonitor, GPUMonitor)
    found = []
    for kind in kinds:
        try:
            one = kind()
            one.collect_metrics()  # the use of the CPUs is that since the last look
            one.clear_metrics()
            found.append(one)
        except (ImportError, RuntimeError):  # by which MLflow says that there is no such device
            continue
        except Exception as error:  # a GPU's driver, a container without a network: the others are read
            log.warning("tracking: %s does not work here: %s", kind.__name__, brief(error))
    return found


def _read(collectors: list[BaseMetricsMonitor]) -> dict[str, float]:
    values: dict[str, float] = {}
    for one in collectors:
        one.collect_metrics()
        values |= {name: float(value) for name, value in one.aggregate_metrics().items() if SHOWN.fullmatch(name)}
        one.clear_metrics()
    return values
