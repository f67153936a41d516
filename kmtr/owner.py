"""One command at a time writes into a folder: a lock with owner and heartbeat, which a dead owner loses.

``<folder>/owner/N.json`` names an owner: machine, process, since when. The highest N is the present one, and a file of
a number that is there already cannot be made, so of two that take a folder over only one succeeds, on any file system
that several nodes share. The owner touches its file every `BEAT_S`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from kmtr.types import KmtrError

log = logging.getLogger(__name__)

FOLDER = "owner"
BEAT_S = 3.0
LEASE_S = 15.0
"""An owner on another machine that gives no sign of life for so long is dead."""


@contextmanager
def owning(folder: Path, what: str, lost: Callable[[], None] | None = None) -> Iterator[None]:
    """Inside, this process owns the folder, which is made if missing.

    Args:
        what: the folder's content in words, for errors.
        lost: called in a thread when another process has taken the folder over, as it may where this one stood still
            for longer than `LEASE_S`; by default this process ends at once, before it writes between that one's files.

    Raises:
        KmtrError: another process owns it.
    """
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    claim = _claimed(place, what)
    released = threading.Event()
    beating = threading.Thread(
        target=_beat, args=(claim, what, lost or _leave, released), name="kmtr-owner", daemon=True
    )
    beating.start()
    try:
        yield
    finally:
        released.set()
        beating.join()
        with contextlib.suppress(OSError):
            claim.with_suffix(".released").touch()


def owned(folder: Path) -> bool:
    """True if a living process owns the folder; one on another machine is waited for, for a sign of life."""
    while claims := _claims(folder / FOLDER):
        with contextlib.suppress(FileNotFoundError):  # taken over meanwhile: look at the next owner
            lives = _owner_of(claims[-1]).lives_here()
            if claims[-1].with_suffix(".released").exists():
                return False
            claims[-1].stat()  # as in _refuse_living
            return _beats(claims[-1]) if lives is None else lives
    return False


@dataclass(frozen=True)
class _Owner:
    """Content of a claim."""

    machine: str
    host: str
    pid: int
    born: float
    since: str

    @classmethod
    def me(cls) -> _Owner:
        process = psutil.Process()
        now = datetime.datetime.now(datetime.UTC)
        return cls(_machine(), socket.gethostname(), process.pid, process.create_time(), f"{now:%Y-%m-%d %H:%M:%S} UTC")

    def lives_here(self) -> bool | None:
        """True if its process lives; None: it is another machine's, or another container's."""
        if self.machine != _machine():
            return None
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.born) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def _machine() -> str:
    """Name of the machine since it was started, and of the container: within it a number of a process means one."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


def _claimed(place: Path, what: str) -> Path:
    """The file of our claim, behind one that is released or whose owner is dead.

    Raises:
        KmtrError: another process owns the folder.
    """
    content = json.dumps(asdict(_Owner.me()))
    while True:
        earlier = _claims(place)
        if earlier:
            try:
                _refuse_living(earlier[-1], what)
            except FileNotFoundError:
                continue
        claim = place / f"{int(earlier[-1].stem) + 1 if earlier else 0}.json"
        whole = place / f"{claim.stem}.{os.getpid()}.{time.time_ns()}.tmp"
        whole.write_text(content)
        try:
            os.link(whole, claim)  # whole or not at all, and not where another one was faster
        except FileExistsError:
            continue
        finally:
            whole.unlink()
        if _claims(place)[-1] != claim:
            claim.unlink(missing_ok=True)  # our number was free again: others came and went since we looked
            continue
        for old in earlier:
            old.unlink(missing_ok=True)
            old.with_suffix(".released").unlink(missing_ok=True)
        return claim


def _claims(place: Path) -> list[Path]:
    """Claims on a folder, the present owner's last."""
    return sorted((p for p in place.glob("*.json") if p.stem.isdecimal()), key=lambda path: int(path.stem))


def _owner_of(claim: Path) -> _Owner:
    """Content of a claim; of a damaged one that of a machine that nobody knows.

    Raises:
        FileNotFoundError: it was taken over meanwhile.
    """
    try:
        return _Owner(**json.loads(claim.read_text()))
    except (ValueError, TypeError):
        return _Owner("", "an unknown machine", 0, 0.0, "an unknown time")


def _refuse_living(claim: Path, what: str) -> None:
    """Return if the claim is free: released, or its owner dead.

    Raises:
        KmtrError: it lives.
        FileNotFoundError: it was taken over meanwhile.
    """
    owner = _owner_of(claim)
    if claim.with_suffix(".released").exists():
        return
    claim.stat()  # raises if it was taken over: a claim is removed before its sign of release
    lives = owner.lives_here()
    if lives is None:
        log.warning(
            "%s: %s has had it since %s; waiting %.0f s for a sign of life", what, owner.host, owner.since, LEASE_S
        )
        lives = _beats(claim)
    if lives:
        raise KmtrError(
            f"{what}: process {owner.pid} on {owner.host} is at work on it since {owner.since}; wait for it, or stop it"
        )
    log.warning("%s: process %d on %s, which had it, is dead; going on", what, owner.pid, owner.host)


def _beats(claim: Path) -> bool:
    """True if the claim is touched within `LEASE_S`. Only changes count, since clocks of machines differ.

    Raises:
        FileNotFoundError: it was taken over meanwhile.
    """
    first, until = claim.stat().st_mtime_ns, time.monotonic() + LEASE_S
    while time.monotonic() < until:
        time.sleep(0.2)
        if claim.stat().st_mtime_ns != first:
            return True
    return False


def _leave() -> None:
    os._exit(1)


def _beat(claim: Path, what: str, lost: Callable[[], None], released: threading.Event) -> None:
    """Touch the claim until it is released, or another one has taken the folder."""
    while not released.wait(BEAT_S):
        try:
            os.utime(claim)
        except FileNotFoundError:
            log.warning("%s: another process took it over while this one stood still; this one ends", what)
            lost()
            return
        except OSError as error:  # a disk that is away for a moment: the next beat tells
            log.warning("%s: no sign of life could be written: %s", what, error.strerror)
