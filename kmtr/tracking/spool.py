"""The spool: training appends to a file, a background thread ships it to MLflow. A dead server costs training nothing.

``<folder>/spool.jsonl`` holds one JSON object a line and is only ever appended to: a head with the run id, then metrics
(``t`` ms since 1970, ``step``, ``metrics``), artifacts (``artifact``, a copy under ``<folder>/staged``; ``to``, the
folder in the run) and the run's end (``end``, its status), which is told when all before it has arrived: a run that is
FINISHED in MLflow has its whole history there. Values that are not finite are written as Python's json does (NaN,
Infinity).
``<folder>/cursor.json`` says up to which byte each kind was shipped, and is replaced atomically after each batch.

A record is shipped at least once, with the time at which it was recorded: what was sent twice because a process died
between batch and cursor is the same point to MLflow, which keeps it once. Each kind has a cursor, so that an artifact
store that refuses doesn't hold up the metrics.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

from kmtr.tracking.run import Status
from kmtr.tracking.store import brief, client, redact, sqlite_file
from kmtr.types import InputError, KmtrError

log = logging.getLogger(__name__)

SPOOL, CURSOR, STAGED = "spool.jsonl", "cursor.json", "staged"
KINDS = ("metrics", "artifact", "end")
METRICS_PER_BATCH = 1000
"""Metrics in one call, by MLflow."""
SHIP_EVERY_S = 2.0
"""Time that records gather before they are shipped together: ten metrics in one call cost 6 ms, one by one 48 ms."""
BACKOFF_S = (0.5, 30.0)
"""First and longest wait after a failed call; doubled in between."""

_NAME = re.compile(r"[\w\-. :/]{1,250}")


class Spool:
    """The one writer of a run's metrics and files: rank 0 of training. Opening the same folder again continues it.

    No call waits for the network, and a full disk or a dead server is told once, not raised.

    Args:
        folder: of this run's spool, made if missing; on a disk that a restarted worker reaches too, else the steps it
            trains again are in MLflow twice.
        uri: the MLflow store, `tracking_uri(config)`.
        run_id: of `open_run`.
        say: where a person reads of a server that went or is back, in a line; by default the log.
        ships: False: it only keeps, for another one to send; two that send at once would look for each other's files.

    Raises:
        InputError: the folder belongs to another run.
    """

    def __init__(
        self,
        folder: str | Path,
        uri: str,
        run_id: str,
        say: Callable[[str], None] = log.warning,
        ships: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self._say = say
        self._recorded: defaultdict[str, set[int]] = defaultdict(set)
        self._lock = threading.Lock()
        self._complained = False
        self._size = self._open(run_id)
        self.continued = bool(self._recorded)  # an earlier process of this run recorded something
        self._file = os.open(self.folder / SPOOL, os.O_WRONLY | os.O_APPEND)
        self._shipper = _Shipper(self.folder, uri, run_id, say)
        self._shipper.pass_over("end", self._size)  # an end that was not told yet: the run goes on
        self._deadline: float | None = None  # monotonic; set by close
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kmtr-spool", daemon=True)
        if ships:
            self._thread.start()

    def metrics(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Records named values of a step. A (name, step) that this spool has already is left out: after a restart some
        steps are trained again.

        Raises:
            InputError: a name that MLflow would refuse.
        """
        for name in values:
            if not _NAME.fullmatch(name):
                raise InputError(f"metric name: expected letters, digits and _-. :/ (at most 250), got {name!r}")
        with self._lock:
            new = {name: float(value) for name, value in values.items() if step not in self._recorded[name]}
            if new and self._append({"t": time.time_ns() // 1_000_000, "step": int(step), "metrics": new}):
                for name in new:
                    self._recorded[name].add(int(step))

    def artifact(self, local_path: str | Path, folder: str = "") -> None:
        """Records a file for the run's artifacts, under `folder` there. It is copied first: the original may change.

        Raises:
            InputError: no such file.
        """
        source = Path(local_path)
        if not source.is_file():
            raise InputError(f"artifact: expected a file, got {str(source)!r}")
        staged = Path(STAGED) / uuid.uuid4().hex / source.name
        try:
            (self.folder / staged).parent.mkdir(parents=True)
            shutil.copyfile(source, self.folder / staged)
        except OSError as error:
            self._complain(error)
            return
        with self._lock:
            self._append({"artifact": str(staged), "to": folder})

    @property
    def reached(self) -> int:
        """Greatest step that it has recorded; -1: none."""
        return max((step for steps in self._recorded.values() for step in steps), default=-1)

    def end(self, status: Status) -> None:
        """Records how the run ended; told when all that was recorded before has arrived."""
        with self._lock:
            self._append({"t": time.time_ns() // 1_000_000, "end": status})

    def close(self, timeout_s: float = 30.0) -> int:
        """Ships what is left, for at most `timeout_s`; the spool takes no more records.

        Returns:
            Number of records (lines) that were not shipped: they stay in the folder, for `replay` or the next `Spool`.
        """
        self._deadline = time.monotonic() + timeout_s
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
        return self._shipper.pending()

    def _open(self, run_id: str) -> int:
        """Size of the spool after what a killed process left half written is cut off; learns what it recorded."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / SPOOL
        path.touch()
        size = 0
        for size, record in _records(path, 0):
            if not record:
                self._complain(OSError(f"unreadable line before byte {size}"))
            for name in record.get("metrics", {}):
                self._recorded[name].add(record["step"])
        os.truncate(path, size)
        if size == 0:
            head = json.dumps({"run_id": run_id}) + "\n"
            path.write_text(head)
            return len(head)
        owner = _owner(self.folder)
        if owner != run_id:
            raise InputError(f"spool {self.folder}: expected that of run {run_id}, got run {owner}; move it away")
        return size

    def _append(self, record: dict[str, Any]) -> bool:
        """One line in one write: whole in the page cache when this returns, so that a killed process loses nothing."""
        line = (json.dumps(record) + "\n").encode()
        try:
            if self._file < 0:
                raise OSError("the spool is closed")
            if os.write(self._file, line) < len(line):
                os.truncate(self.folder / SPOOL, self._size)  # the next line must not be joined to half of this one
                raise OSError("no space left")
        except OSError as error:
            self._complain(error)
            return False
        self._size += len(line)
        return True

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._say(f"metrics or files are lost, training goes on: spool {self.folder}: {brief(error)}")
            self._complained = True

    def _run(self) -> None:
        """The thread: ships every `SHIP_EVERY_S`, and at the end until all is shipped or the deadline has passed."""
        while True:
            self._shipper.ship()
            if self._deadline is None:
                self._wake.wait(SHIP_EVERY_S)
                if self._deadline is not None:
                    self._shipper.retry_now()
            elif not self._shipper.pending() or time.monotonic() >= self._deadline:
                return
            else:
                time.sleep(0.1)


def replay(folder: str | Path, uri: str, timeout_s: float = 30.0) -> int:
    """Ships what a dead process left in its spool; harmless where nothing is left or the writer still lives.

    Returns:
        Number of records that were not shipped within `timeout_s`. No spool: 0.
    """
    folder = Path(folder)
    run_id = _owner(folder)
    if run_id is None:
        return 0
    shipper = _Shipper(folder, uri, run_id)
    deadline = time.monotonic() + timeout_s
    while True:
        shipper.ship()
        left = shipper.pending()
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(0.1)


def send(folder: str | Path, uri: str, status: Status, timeout_s: float = 30.0) -> int:
    """`replay` of the spool of a run that ended so; its end is recorded first, as of its last record, where it is not.

    Returns:
        Number of records that were not shipped within `timeout_s`.
    """
    path = Path(folder) / SPOOL
    if path.is_file() and not ended(folder):
        moment = _last(path, 0)[1].get("t", time.time_ns() // 1_000_000)
        with path.open("a") as file:
            file.write(json.dumps({"t": moment, "end": status}) + "\n")
    return replay(folder, uri, timeout_s)


def owner(folder: str | Path) -> str | None:
    """Id of the run that a spool belongs to; None: there is no spool.

    Raises:
        InputError: the file is something else.
    """
    return _owner(Path(folder))


def unsent(folder: str | Path) -> int:
    """Records of a spool that MLflow does not have yet; 0 where there is no spool."""
    path = Path(folder)
    return _behind(path, _read_cursor(path / CURSOR)) if (path / SPOOL).is_file() else 0


def ended(folder: str | Path) -> bool:
    """True if the last record of a spool is the run's end."""
    path = Path(folder) / SPOOL
    return path.is_file() and "end" in _last(path, 0)[1]


def history(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Records of a spool, sent or not: metric -> (step, value) in order; empty where there is no spool."""
    path = Path(folder) / SPOOL
    curves: dict[str, list[tuple[int, float]]] = {}
    for _, record in _records(path, 0) if path.exists() else ():
        for name, value in record.get("metrics", {}).items():
            curves.setdefault(name, []).append((int(record["step"]), float(value)))
    return curves


def moments(folder: str | Path, name: str) -> list[float]:
    """Times at which a metric was recorded, seconds since 1970, in order; empty where there is no spool."""
    path = Path(folder) / SPOOL
    records = _records(path, 0) if path.exists() else ()
    return [record["t"] / 1000 for _, record in records if name in record.get("metrics", {})]


def _behind(folder: Path, cursor: Mapping[str, int], kinds: Sequence[str] = KINDS) -> int:
    """Records on disk behind the cursors of these kinds."""
    return sum(kind in record for kind in kinds for _, record in _records(folder / SPOOL, cursor[kind]))


class _Shipper:
    """Moves the cursors of one spool forward. Each kind of record waits on its own after a failure."""

    def __init__(self, folder: Path, uri: str, run_id: str, say: Callable[[str], None] = log.warning) -> None:
        self._folder, self._uri, self._run_id, self._say = folder, uri, run_id, say
        self._cursor = _read_cursor(folder / CURSOR)
        self._failures = dict.fromkeys(KINDS, 0)
        self._next_try = dict.fromkeys(KINDS, 0.0)

    def pending(self) -> int:
        """Records on disk behind their cursors."""
        return _behind(self._folder, self._cursor)

    def pass_over(self, kind: str, size: int) -> None:
        """Records of a kind up to this byte are not shipped any more."""
        self._cursor[kind] = max(self._cursor[kind], size)

    def retry_now(self) -> None:
        """Waits no longer after earlier failures: the end of training is worth another try at once."""
        for kind in KINDS:
            self._failures[kind], self._next_try[kind] = min(self._failures[kind], 1), 0.0

    def ship(self) -> None:
        """Ships what is there, in batches, until all is shipped or a call fails."""
        sends = {"metrics": self._send_metrics, "artifact": self._send_artifact, "end": self._send_end}
        for kind, send in sends.items():
            if time.monotonic() < self._next_try[kind]:
                continue
            try:
                while send():
                    self._told_recovered(kind)
            except Exception as error:  # whatever a store, a proxy or a cloud's client raises: told, tried again later
                self._failed(kind, error)

    def _send_metrics(self) -> bool:
        """Ships the next batch; False: there is none."""
        batch: list[tuple[str, float, int, int]] = []
        end = start = self._cursor["metrics"]
        for after, record in _records(self._folder / SPOOL, start):
            values = record.get("metrics", {})
            if batch and len(batch) + len(values) > METRICS_PER_BATCH:
                break
            batch += [(name, value, record["t"], record["step"]) for name, value in values.items()]
            end = after
        if batch:
            mlflow = self._client()
            from mlflow.entities import Metric

            points = [Metric(*point) for point in batch]
            for i in range(0, len(points), METRICS_PER_BATCH):  # a single record may be larger than a batch
                mlflow.log_batch(self._run_id, metrics=points[i : i + METRICS_PER_BATCH])
        return self._advance("metrics", start, end)

    def _send_artifact(self) -> bool:
        """Uploads the next file; False: there is none."""
        start = end = self._cursor["artifact"]
        for after, record in _records(self._folder / SPOOL, start):
            end = after
            if "artifact" in record:
                staged = self._folder / record["artifact"]
                if staged.exists():  # else: uploaded already, by a process that died before it moved the cursor
                    self._client().log_artifact(self._run_id, str(staged), record["to"] or None)
                    shutil.rmtree(staged.parent)
                break
        return self._advance("artifact", start, end)

    def _send_end(self) -> bool:
        """Tells how the run ended, if all before it has arrived and nothing came after it; False: nothing to tell."""
        if _behind(self._folder, self._cursor, ("metrics", "artifact")):
            return False
        start = self._cursor["end"]
        end, last = _last(self._folder / SPOOL, start)
        if "end" in last:
            self._client().set_terminated(self._run_id, str(last["end"]), end_time=int(last["t"]))
        return self._advance("end", start, end)

    def _client(self) -> Any:
        file = sqlite_file(self._uri)
        if (
            file is not None and not file.exists()
        ):  # opening it would make an empty store, on a node that can't see ours
            raise KmtrError(f"{file}: no such file on this machine; several nodes need an MLflow server: tracking.uri")
        return client(self._uri)

    def _advance(self, kind: str, start: int, end: int) -> bool:
        if end > start:
            self._cursor[kind] = end
            temporary = self._folder / f"{CURSOR}.{os.getpid()}"
            temporary.write_text(json.dumps(self._cursor))
            temporary.replace(self._folder / CURSOR)
        return end > start

    def _failed(self, kind: str, error: Exception) -> None:
        self._failures[kind] += 1
        wait = min(BACKOFF_S[0] * 2 ** (self._failures[kind] - 1), BACKOFF_S[1])
        self._next_try[kind] = time.monotonic() + wait
        if sum(self._failures.values()) == 1:
            what = "files" if kind == "artifact" else "records"
            self._say(
                f"MLflow at {redact(self._uri)} takes no {what} now, training goes on and {self._folder} keeps them: "
                f"{brief(error)}"
            )

    def _told_recovered(self, kind: str) -> None:
        failed, self._failures[kind] = self._failures[kind], 0
        if failed and not sum(self._failures.values()):
            self._say(f"MLflow at {redact(self._uri)} answers again: shipping what {self._folder} kept")


def _records(path: Path, offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset after it, record) of each whole line from `offset` on; a half written last line is left out."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield offset, _parse(line)


def _last(path: Path, offset: int) -> tuple[int, dict[str, Any]]:
    """(byte offset after it, record) of the last whole line from `offset` on; (offset, empty): there is none."""
    found: deque[tuple[int, dict[str, Any]]] = deque(_records(path, offset), maxlen=1)
    return found[0] if found else (offset, {})


def _parse(line: bytes) -> dict[str, Any]:
    """A record; empty where the disk damaged the line: one lost point must not stop all that follow."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _owner(folder: Path) -> str | None:
    """Id of the run that the spool belongs to; None: there is no spool, or not one whole line of it.

    Raises:
        InputError: the file is something else.
    """
    path = folder / SPOOL
    if not path.exists():
        return None
    for _, head in _records(path, 0):
        if "run_id" not in head:
            raise InputError(f"spool {path}: expected a first line with run_id, got something else; move it away")
        return str(head["run_id"])
    return None


def _read_cursor(path: Path) -> dict[str, int]:
    cursor = _parse(path.read_bytes()) if path.exists() else {}  # unreadable: all is shipped again, which is harmless
    return {kind: int(cursor.get(kind, 0)) for kind in KINDS}
