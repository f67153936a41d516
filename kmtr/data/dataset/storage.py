"""Local paths and object stores behind one small interface: whole files, ranges of files, and a local cache.

Which store: a path is local; ``s3://bucket/prefix`` is any S3-compatible store (region, endpoint and credentials from
the usual ``AWS_*`` variables or the URI's query); ``gs://``, ``abfs://`` and ``hdfs://`` are pyarrow's; what pyarrow
does not know is left to fsspec. URIs travel between processes, file systems do not: each process opens its own, once.

Who retries: the S3 client tries a request 4 times (5xx, throttling, reset, cut, stalled; backoff with jitter), but its
retries come from a quota of 100 that an outage under many reads in flight exhausts, and other stores' clients differ.
So every operation here is tried up to 5 times within a minute on top of that; reads through `File.native` are not.
What no retry mends (missing, refused, wrong bucket) is said at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import re
import tempfile
import threading
import time
import uuid
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from kmtr.types import InputError, KmtrError

T = TypeVar("T")

UPLOAD_IS_ATOMIC = ("s3", "gcs", "abfs")
"""Stores (pyarrow's names) where an object appears whole or not at all, and renaming would be copy and delete."""


class StoreError(KmtrError):
    """A store that still failed after all tries; it may work later."""


# ------------------------------------------------------------------------------------------------------------- stores


def absolute(root: str) -> str:
    """`root` as it must be before any worker starts, since Ray changes the workers' directory; URIs stay
    as they are.
    """
    return root if "://" in root else str(Path(root).expanduser().absolute())


def open_root(root: str) -> tuple[fs.FileSystem, str]:
    """File system and base path of a local path or URI; one file system per store and process.

    Raises:
        InputError: the URI's scheme or options are unknown, or its store can't be reached.
    """
    if "://" not in root:
        return _LOCAL, absolute(root)
    try:
        return _open_s3(root) if root.startswith("s3://") else _open_other(root)
    except (OSError, ValueError, ImportError, pa.ArrowException) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{shown(root)}: expected a path or an object-store URI, got: {_first_line(error)}") from None


def shown(root: str) -> str:
    """`root` without the credentials that a URI can hold."""
    return re.sub(r"://[^/@]*@", "://", root)


_LOCAL = fs.LocalFileSystem()

_S3_TEXTS = ("region", "scheme", "endpoint_override", "tls_ca_file_path")
_S3_FLAGS = ("anonymous", "allow_bucket_creation", "allow_bucket_deletion", "force_virtual_addressing")

S3_TRIES = 4
S3_CONNECT_S = 5.0
S3_STALLED_S = 10.0
"""A transfer that moves no byte for so long is given up, and tried again."""


def _open_s3(root: str) -> tuple[fs.FileSystem, str]:
    """The client and ``bucket/prefix`` of an S3 URI: options from its query, else from the environment.

    pyarrow's own `from_uri` knows neither retries nor time-outs, and asks AWS for a region that the environment names.
    """
    parts = urlsplit(root)
    bucket, prefix = parts.netloc.rpartition("@")[2], parts.path.strip("/")
    if not bucket:
        raise InputError(f"{root}: expected s3://bucket/prefix, got no bucket")
    options: dict[str, Any] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name in _S3_FLAGS:
            options[name] = value.lower() in ("true", "1")
        elif name in _S3_TEXTS:
            options[name] = value
        else:
            known = ", ".join((*_S3_TEXTS, *_S3_FLAGS))
            raise InputError(f"{shown(root)}: unknown option {name!r}, expected one of {known}")
    if parts.username:
        options |= {"access_key": unquote(parts.username), "secret_key": unquote(parts.password or "")}
    environment = os.environ.get
    endpoint = options.get("endpoint_override") or environment("AWS_ENDPOINT_URL_S3") or environment("AWS_ENDPOINT_URL")
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        options["endpoint_override"] = host.rstrip("/")
        options.setdefault("scheme", scheme or "https")
    region = environment("AWS_REGION") or environment("AWS_DEFAULT_REGION") or ("us-east-1" if endpoint else None)
    options.setdefault("region", region)
    return _s3(bucket, tuple(sorted(options.items()))), f"{bucket}/{prefix}".rstrip("/")


@lru_cache
def _s3(bucket: str, options: tuple[tuple[str, Any], ...]) -> fs.S3FileSystem:
    settings = dict(options)
    settings["region"] = settings["region"] or _patiently(partial(fs.resolve_s3_region, bucket), bucket)
    store = fs.S3FileSystem(
        **settings,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=S3_TRIES),
        connect_timeout=S3_CONNECT_S,
        request_timeout=S3_STALLED_S,
        allow_delayed_open=False,  # else a multipart upload that can't begin ends as an empty object
    )
    if settings.get("allow_bucket_creation"):
        _patiently(partial(store.create_dir, bucket), bucket)
    return store


@lru_cache
def _open_other(root: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's file system of a URI, else fsspec's."""
    if root.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in root:
        root += f"{'&' if '?' in root else '?'}retry_limit_seconds={PATIENCE_S:.0f}"  # its own are 15 minutes
    try:
        store, base = fs.FileSystem.from_uri(root)
    except pa.ArrowInvalid as error:
        if "Unrecognized filesystem" not in str(error):
            raise
        import fsspec  # type: ignore[import-untyped]

        other, base = fsspec.core.url_to_fs(root)
        store = fs.PyFileSystem(fs.FSSpecHandler(other))
    return store, base.rstrip("/")


# ------------------------------------------------------------------------------------------------------------ retries

TRIES = 5
PATIENCE_S = 60.0
"""No further try once an operation has taken so long."""

_TRANSIENT = re.compile(
    r"NETWORK_CONNECTION|SLOW_?DOWN|UNAVAILABLE|INTERNAL_FAILURE|THROTTL|TOO_?MANY_?REQUESTS|REQUEST_TIMEOUT|"
    r"HTTP status (408|429|5\d\d)|DEADLINE_EXCEEDED|timed? ?out|connection (reset|refused|aborted)|broken pipe",
    re.IGNORECASE,
)
_REFUSED = re.compile(
    r"ACCESS_?DENIED|ACCESS_?KEY|SIGNATURE|TOKEN|UNRECOGNIZED_CLIENT|AUTHENTICAT|PERMISSION_?DENIED|CREDENTIAL|"
    r"TIME_TOO_SKEWED|HTTP status 40[013]|Forbidden",
    re.IGNORECASE,
)
"""400 without a reason is S3's answer to an expired token where no body comes (HEAD), or where the client loses it."""
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|NoSuchBucket|Bucket '.*' not found|bucket does not exist", re.IGNORECASE)


def _patiently(call: Callable[[], T], path: str) -> T:
    """The call's result, tried again after transient errors: waits of 0.5, 1, 2 and 4 s, half of each at random.

    Raises:
        InputError: the store refuses, or there is no such bucket.
        FileNotFoundError: no such object.
        StoreError: the last try failed too, or the store said something else (at once).
    """
    began = time.monotonic()
    for tried in count(1):
        try:
            return call()
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: expected an object, got none") from None
        except OSError as error:
            text = _first_line(error)
            if _NO_BUCKET.search(text):
                raise InputError(_no_bucket(path)) from None
            if _TRANSIENT.search(text) or isinstance(error, ConnectionError | TimeoutError):
                if tried == TRIES or time.monotonic() - began > PATIENCE_S:
                    raise StoreError(
                        f"{path}: the store failed {tried} times in {time.monotonic() - began:.0f} s, last: {text}; "
                        "check endpoint and network, then start again"
                    ) from None
            elif _REFUSED.search(text):
                raise InputError(
                    f"{path}: expected a store that lets us in, got: {text}; "
                    "check the credentials, what they allow, and the URI"
                ) from None
            else:
                raise StoreError(f"{path}: expected a store that answers, got: {text}") from None
        time.sleep(random.uniform(0.5, 1.0) * 2.0 ** (tried - 2))  # never near zero: five tries outlast 3.7 s
    raise AssertionError("count never ends")  # for the type checker


def _no_bucket(path: str) -> str:
    bucket = path.partition("/")[0]
    return f"{bucket}: expected a bucket, got none of that name; check the URI and the endpoint, or make it first"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _is_local(store: fs.FileSystem) -> bool:
    return isinstance(store, fs.LocalFileSystem)


# -------------------------------------------------------------------------------------------------------- whole files


def read_bytes(store: fs.FileSystem, path: str) -> bytes:
    """A whole, small file."""

    def read() -> bytes:
        with store.open_input_stream(path) as stream:
            return stream.read()

    return read() if _is_local(store) else _patiently(read, path)


def exists(store: fs.FileSystem, path: str) -> bool:
    """Whether the file is there.

    Raises:
        InputError: its bucket isn't, or the store refuses.
    """
    if _is_local(store):
        return store.get_file_info(path).type == fs.FileType.File
    found = _patiently(partial(store.get_file_info, path), path).type
    if found == fs.FileType.NotFound:
        _check_bucket(store, path)
    return found == fs.FileType.File


def make_folder(store: fs.FileSystem, path: str) -> None:
    """A folder and those above it; object stores have none, so that only their bucket is looked for."""
    if _is_local(store):
        store.create_dir(path, recursive=True)
    elif store.type_name == "s3":
        _check_bucket(store, path)
    elif store.type_name not in UPLOAD_IS_ATOMIC:
        _patiently(partial(store.create_dir, path, recursive=True), path)


def write_atomic(store: fs.FileSystem, path: str, content: bytes) -> None:
    """The whole file or none of it, also after a crash: one upload to an object store; elsewhere written under a
    temporary name, then renamed.
    """
    if _is_local(store):
        _write_local(path, content)
    elif store.type_name in UPLOAD_IS_ATOMIC:
        _patiently(partial(_put, store, path, content), path)
    else:
        temporary = _temporary(path)
        _patiently(partial(_put, store, temporary, content), path)
        _patiently(partial(store.move, temporary, path), path)


@contextlib.contextmanager
def writing(root: str, name: str) -> Iterator[BinaryIO]:
    """A local file to write that becomes ``root/name`` at the end of the block: the whole of it, or nothing.

    What goes to an object store is written to a temporary folder first and then uploaded.
    """
    store, base = open_root(root)
    target = f"{base}/{name}"
    make_folder(store, os.path.dirname(target))
    with contextlib.nullcontext("") if _is_local(store) else tempfile.TemporaryDirectory() as folder:
        temporary = _temporary(target) if _is_local(store) else f"{folder}/whole"
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if _is_local(store):
                os.replace(temporary, target)
                _sync_folder(os.path.dirname(target))
            else:
                _upload(store, temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)


def _upload(store: fs.FileSystem, source: str, target: str) -> None:
    """A local file to a store. The index beside a shard comes after it, and says that it is whole."""
    if store.type_name in UPLOAD_IS_ATOMIC:
        _patiently(partial(_copy, store, source, target), target)
    else:
        temporary = _temporary(target)
        _patiently(partial(_copy, store, source, temporary), target)
        _patiently(partial(store.move, temporary, target), target)


def _copy(store: fs.FileSystem, source: str, target: str) -> None:
    # Again one write, of the mapped file: closing after an error between two would complete the upload.
    with pa.memory_map(source) as file, store.open_output_stream(target) as sink:
        sink.write(file.read_buffer())


def _put(store: fs.FileSystem, path: str, content: bytes) -> None:
    # One write: if it fails, closing the stream does not complete the upload, and what was there stays.
    with store.open_output_stream(path) as stream:
        stream.write(content)


def _write_local(path: str, content: bytes) -> None:
    temporary = _temporary(path)
    try:
        with open(temporary, "xb", buffering=0) as file:
            _write_all(file.fileno(), memoryview(content), 0)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    _sync_folder(os.path.dirname(path))


def _temporary(path: str) -> str:
    return f"{path}.{uuid.uuid4().hex[:12]}.tmp"  # a process's number is not unique among nodes on one file system


def _sync_folder(folder: str) -> None:
    """Makes a rename in the folder last through a power failure."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _write_all(number: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(number, content, offset)
        content, offset = content[written:], offset + written


def _check_bucket(store: fs.FileSystem, path: str) -> None:
    """S3 says of an object in a missing bucket only that the object is missing."""
    bucket = path.partition("/")[0]
    if store.type_name == "s3" and (
        _patiently(partial(store.get_file_info, bucket), bucket).type == fs.FileType.NotFound
    ):
        raise InputError(_no_bucket(path))


# ------------------------------------------------------------------------------------------------------------- ranges


class File(ABC):
    """A file open for reading at any place, by any number of threads at once. Close it when no thread reads any more.

    Attributes:
        name: for errors.
        size: bytes.
    """

    name: str
    size: int

    @abstractmethod
    def read_into(self, offset: int, *targets: Any) -> None:
        """Fill the targets (writable, contiguous), one after the other, with the bytes from `offset` on, by one read
        and without Python's lock.

        Raises:
            EOFError: the file ends before.
        """

    @abstractmethod
    def read_at(self, offset: int, nbytes: int) -> pa.Buffer:
        """The `nbytes` bytes from `offset` on.

        Raises:
            EOFError: the file ends before.
        """

    @abstractmethod
    def native(self) -> pa.NativeFile:
        """The same bytes as pyarrow wants them, e.g. for footers; usable until `close`."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ends(self, offset: int, nbytes: int) -> EOFError:
        return EOFError(
            f"{self.name}: expected {nbytes} bytes at {offset}, got the end of the file at {self.size}: truncated or "
            "changed; restore or rewrite it"
        )


def open_file(root: str, name: str, cache: Cache | None = None, size: int | None = None, version: str = "") -> File:
    """The file `name` below `root`.

    Args:
        cache: keeps whole files of stores that are not local; a file in it is opened without a request.
        size: what the file must have, bytes.
        version: content's identity (e.g. SHA-256), part of the cache's key: two files of one size aren't mistaken.

    Raises:
        FileNotFoundError: no such file.
        EOFError: another size than `size`.
        InputError: the store refuses, has no such bucket, or the file is larger than the cache.
        StoreError: the store failed after all tries.
    """
    store, base = open_root(root)
    path = f"{base}/{name}"
    if _is_local(store):
        file: File = _LocalFile(path, name)
    elif cache is None:
        file = _RemoteFile(store, path, name)
    else:
        remote = partial(_RemoteFile, store, path, name)
        expected = remote().size if size is None else size
        file = cache.open(remote, name, _key(root, name, expected, version), expected)
    if size is not None and file.size != size:
        found = file.size
        file.close()
        raise EOFError(f"{name}: expected {size} bytes, got {found}: truncated or changed; restore or rewrite it")
    return file


class _LocalFile(File):
    def __init__(self, path: str | Path, name: str, released: Callable[[], None] = lambda: None):
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, _release, self._number, released)
        self.name, self.size = name, os.fstat(self._number).st_size

    def read_into(self, offset: int, *targets: Any) -> None:
        rest = [view for target in targets if (view := _bytes(target))]
        start, nbytes = offset, sum(map(len, rest))
        while rest:
            got = os.preadv(self._number, rest, offset)  # at most 2 GiB at a time
            if not got:
                raise self._ends(start, nbytes)
            offset += got
            while rest and got >= len(rest[0]):
                got -= len(rest.pop(0))
            if rest:
                rest[0] = rest[0][got:]

    def read_at(self, offset: int, nbytes: int) -> pa.Buffer:
        if offset + nbytes > self.size:
            raise self._ends(offset, nbytes)
        buffer = pa.allocate_buffer(nbytes)
        self.read_into(offset, buffer)
        return buffer

    def native(self) -> pa.NativeFile:
        return pa.OSFile(f"/dev/fd/{self._number}", "rb")  # this very file, whatever its path names by now

    def touch(self) -> None:
        """Set the time of last use to now, finer than the system's clock ticks."""
        now = time.time_ns()
        os.utime(self._number, ns=(now, now))

    def close(self) -> None:
        self._close()


def _release(number: int, released: Callable[[], None]) -> None:
    os.close(number)
    released()


class _RemoteFile(File):
    def __init__(self, store: fs.FileSystem, path: str, name: str):
        try:
            self._file = _patiently(partial(store.open_input_file, path), path)
            self.size = _patiently(self._file.size, path)
        except FileNotFoundError:
            _check_bucket(store, path)
            raise
        self.name, self._path = name, path

    def read_into(self, offset: int, *targets: Any) -> None:
        views = [view for target in targets if (view := _bytes(target))]
        content = self.read_at(offset, sum(map(len, views)))  # Arrow's memory: no call of its reads into ours
        start = 0
        for view in views:
            pa.FixedSizeBufferWriter(pa.py_buffer(view)).write(content.slice(start, len(view)))
            start += len(view)

    def read_at(self, offset: int, nbytes: int) -> pa.Buffer:
        if offset + nbytes > self.size:
            raise self._ends(offset, nbytes)
        content = _patiently(partial(self._file.read_at, nbytes, offset), self._path)
        if len(content) < nbytes:
            raise self._ends(offset, nbytes)
        return pa.py_buffer(content)

    def native(self) -> pa.NativeFile:
        return self._file

    def close(self) -> None:
        self._file.close()


def _bytes(target: Any) -> memoryview:
    view = memoryview(target)
    return view.cast("B") if view.nbytes else memoryview(b"")


def read_many(ranges: Iterable[tuple[File, int, Any]], threads: int = 8) -> None:
    """Fill many targets, several reads in flight: (file, offset, target) as in `File.read_into`; see `run_many`."""
    run_many([partial(file.read_into, offset, target) for file, offset, target in ranges], threads)


def run_many(calls: Iterable[Callable[[], object]], threads: int) -> None:
    """Make all calls, `threads` of them at a time; on return, and also after an error, none is under way any more."""
    if threads == 1:
        for call in calls:
            call()
        return
    running = [_pool(threads).submit(call) for call in calls]
    try:
        for read in running:
            read.result()
    finally:
        for read in running:
            read.cancel()
        wait(running)


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "storage")


# -------------------------------------------------------------------------------------------------------------- cache

PIECE_BYTES = 16 << 20
PIECES_IN_FLIGHT = 4
"""Of a download: enough to fill a fast network, 64 MiB of memory."""

_opened: Counter[Path] = Counter()
_opened_lock = threading.RLock()
"""Cached files that this process holds open; they are not evicted. Re-entrant: a collected file releases its own."""


@dataclass(frozen=True)
class Cache:
    """Whole files of an object store in a local folder that all processes of a node share.

    A file is downloaded once, to a temporary name, by whoever locks that first; others wait and then open it. Room is
    made before a download begins, temporary files included: the least recently opened go first, never those that this
    process holds open. Another process may evict them all the same: an open file stays readable without its name, and
    its space is free once it is closed. If there is no room even so, the file is read from the store. A process
    that dies leaves at most a temporary file, which the next that needs room removes.

    Attributes:
        folder: local, on a file system with locks (flock).
        gib: of all its files together.
    """

    folder: str
    gib: float

    def open(self, remote: Callable[[], File], name: str, key: str, size: int) -> File:
        """The cached file of `key`, downloaded if need be; `remote()` if there is no room for it or its size
        differs.

        Raises:
            InputError: the file is larger than the cache, or the folder can't be used.
        """
        if size > self._bound:
            raise InputError(
                f"{name}: expected files that fit into data.cache_gib={self.gib:g}, got one of {size / 2**30:.3g} GiB; "
                "enlarge the cache, or use none"
            )
        folder = Path(self.folder).expanduser().resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return _open_cached(folder / f"{key}.file", name, size) or self._fetch(remote, name, folder / key, size)
        except OSError as error:
            if error.errno is None:  # of the store; this machine's have a number
                raise
            raise InputError(
                f"data.cache={self.folder}: expected a local folder with room for {self.gib:g} GiB, "
                f"got: {error.strerror}"
            ) from None

    @property
    def _bound(self) -> int:
        return int(self.gib * 2**30)

    def _fetch(self, remote: Callable[[], File], name: str, stem: Path, size: int) -> File:
        part, whole = stem.with_suffix(".part"), stem.with_suffix(".file")
        with _exclusive(part) as number:
            if cached := _open_cached(whole, name, size):
                return cached  # another was faster
            source = remote()
            if source.size != size or not self._reserve(stem.parent, number, size):
                return source
            with source:
                _download(source, number)
            os.fsync(number)
            os.replace(part, whole)
            return _open_cached(whole, name, size) or remote()  # evicted meanwhile, in a cache of few files

    def _reserve(self, folder: Path, number: int, size: int) -> bool:
        """Give the empty file `number` its size, having evicted what is needed; False, nothing done: no room."""
        with _exclusive(folder / "room.lock"), _opened_lock:
            os.ftruncate(number, 0)
            for part in folder.glob("*.part"):
                _remove_if_left(part)
            files = sorted((s.st_mtime_ns, s.st_size, path) for path, s in _stats(folder, "*.file"))
            excess = size - self._bound + sum(s.st_size for _, s in _stats(folder, "*.part"))
            excess += sum(nbytes for _, nbytes, _ in files)
            evicted = []
            for _, nbytes, path in files:
                if excess > 0 and not _opened[path]:
                    evicted.append(path)
                    excess -= nbytes
            if excess > 0:
                return False
            for path in evicted:
                path.unlink(missing_ok=True)
            os.ftruncate(number, size)
            return True


def _key(root: str, name: str, size: int, version: str) -> str:
    return hashlib.sha256("\n".join((root, name, str(size), version)).encode()).hexdigest()[:32]


def _open_cached(path: Path, name: str, size: int) -> File | None:
    """A file of the cache, marked as used now; None if it isn't there, or was torn by a power failure."""
    with _opened_lock:
        try:
            file = _LocalFile(path, name, partial(_forget, path))
        except FileNotFoundError:
            return None
        _opened[path] += 1
    if file.size != size:
        file.close()
        path.unlink(missing_ok=True)
        return None
    file.touch()
    return file


def _forget(path: Path) -> None:
    with _opened_lock:
        _opened[path] -= 1
        if not _opened[path]:
            del _opened[path]


def _download(source: File, number: int) -> None:
    def piece(offset: int) -> None:
        content = source.read_at(offset, min(PIECE_BYTES, source.size - offset))
        _write_all(number, memoryview(content), offset)

    with ThreadPoolExecutor(PIECES_IN_FLIGHT) as pool:  # its end waits: nobody writes to a closed file's number
        list(pool.map(piece, range(0, source.size, PIECE_BYTES)))


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[int]:
    """The file `path`, made if need be, locked against every other process and thread, and removed in the end unless it
    was renamed; its lock ends with the process.
    """
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(number, fcntl.LOCK_EX)
            if not _names(path, number):
                continue  # removed or renamed by whoever had the lock before
            try:
                yield number
            finally:
                if _names(path, number):
                    path.unlink()
            return
        finally:
            os.close(number)


def _remove_if_left(path: Path) -> None:
    """Remove a temporary file that no process has locked: its own died."""
    try:
        number = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _names(path, number):
            path.unlink()
    except BlockingIOError:
        pass
    finally:
        os.close(number)


def _names(path: Path, number: int) -> bool:
    """Whether `path` is the open file `number`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(number))
    except FileNotFoundError:
        return False


def _stats(folder: Path, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            yield path, path.stat()
