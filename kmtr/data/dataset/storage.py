"""Local paths and object stores behind one small interface: which file system, and whole files.

Which store: a path is local; ``s3://bucket/prefix`` is any S3-compatible store (region, endpoint and credentials from
the usual ``AWS_*`` variables or the URI's query); ``gs://``, ``abfs://`` and ``hdfs://`` are pyarrow's; what pyarrow
does not know is left to fsspec. URIs travel between processes, file systems do not: each process opens its own, once.
Parts of files: `kmtr.data.dataset.files`.

Operations of object stores are tried again where that can help. The S3 client tries a request 4 times (5xx, throttling,
reset, cut, stalled; backoff with jitter), but its retries come from a quota of 100 that an outage under many reads in
flight exhausts, and other stores' clients differ. So every operation is tried up to 5 times within a minute on top of
that; reads through `files.File.native` are not. What no retry mends (missing, refused, wrong bucket) is said at once.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from kmtr import files
from kmtr.types import InputError, KmtrError, first_line

T = TypeVar("T")

UPLOAD_IS_ATOMIC = ("s3", "gcs", "abfs")
"""Stores (pyarrow's names) where an object appears whole or not at all, and renaming would be copy and delete."""


# ------------------------------------------------------------------------------------------------------------ patience

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


class StoreError(KmtrError):
    """A store that still failed after all tries; it may work later."""


def patiently(call: Callable[[], T], path: str) -> T:
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
            text = first_line(error)
            if _NO_BUCKET.search(text):
                raise InputError(no_bucket(path)) from None
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


def no_bucket(path: str) -> str:
    bucket = path.partition("/")[0]
    return f"{bucket}: expected a bucket, got none of that name; check the URI and the endpoint, or make it first"


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
        raise InputError(f"{shown(root)}: expected a path or an object-store URI, got: {first_line(error)}") from None


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
    settings["region"] = settings["region"] or patiently(partial(fs.resolve_s3_region, bucket), bucket)
    store = fs.S3FileSystem(
        **settings,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=S3_TRIES),
        connect_timeout=S3_CONNECT_S,
        request_timeout=S3_STALLED_S,
        allow_delayed_open=False,  # else a multipart upload that can't begin ends as an empty object
    )
    if settings.get("allow_bucket_creation"):
        patiently(partial(store.create_dir, bucket), bucket)
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


def reason(error: BaseException) -> str:
    """Reason that an error gives, in one line, without the path that the system's own errors hold."""
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def is_local(store: fs.FileSystem) -> bool:
    return isinstance(store, fs.LocalFileSystem)


# -------------------------------------------------------------------------------------------------------- whole files


def read_bytes(store: fs.FileSystem, path: str) -> bytes:
    """A whole, small file."""

    def read() -> bytes:
        with store.open_input_stream(path) as stream:
            return stream.read()

    return read() if is_local(store) else patiently(read, path)


def exists(store: fs.FileSystem, path: str) -> bool:
    """True if the file is there.

    Raises:
        InputError: its bucket isn't, or the store refuses.
    """
    if is_local(store):
        return store.get_file_info(path).type == fs.FileType.File
    found = patiently(partial(store.get_file_info, path), path).type
    if found == fs.FileType.NotFound:
        check_bucket(store, path)
    return found == fs.FileType.File


def make_folder(store: fs.FileSystem, path: str) -> None:
    """A folder and those above it; object stores have none, so that only their bucket is looked for."""
    if is_local(store):
        store.create_dir(path, recursive=True)
    elif store.type_name == "s3":
        check_bucket(store, path)
    elif store.type_name not in UPLOAD_IS_ATOMIC:
        patiently(partial(store.create_dir, path, recursive=True), path)


def write_atomic(store: fs.FileSystem, path: str, content: bytes) -> None:
    """The whole file or none of it, also after a crash: one upload to an object store; elsewhere written under a
    temporary name, then renamed.
    """
    if is_local(store):
        files.write_atomic(Path(path), content)
    elif store.type_name in UPLOAD_IS_ATOMIC:
        patiently(partial(_put, store, path, content), path)
    else:
        temporary = files.temporary_name(path)
        patiently(partial(_put, store, temporary, content), path)
        patiently(partial(store.move, temporary, path), path)


@contextlib.contextmanager
def writing(root: str, name: str) -> Iterator[BinaryIO]:
    """A local file to write that becomes ``root/name`` at the end of the block: the whole of it, or nothing.

    What goes to an object store is written to a temporary folder first and then uploaded.
    """
    store, base = open_root(root)
    target = f"{base}/{name}"
    make_folder(store, os.path.dirname(target))
    if is_local(store):
        with files.replacing(Path(target)) as temporary, open(temporary, "xb") as file:
            yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/whole", "xb") as file:
            yield file
        _upload(store, f"{folder}/whole", target)


def _upload(store: fs.FileSystem, source: str, target: str) -> None:
    """A local file to a store. The index beside a shard comes after it, and says that it is whole."""
    if store.type_name in UPLOAD_IS_ATOMIC:
        patiently(partial(_copy, store, source, target), target)
    else:
        temporary = files.temporary_name(target)
        patiently(partial(_copy, store, source, temporary), target)
        patiently(partial(store.move, temporary, target), target)


def _copy(store: fs.FileSystem, source: str, target: str) -> None:
    # Again one write, of the mapped file: closing after an error between two would complete the upload.
    with pa.memory_map(source) as file, store.open_output_stream(target) as sink:
        sink.write(file.read_buffer())


def _put(store: fs.FileSystem, path: str, content: bytes) -> None:
    # One write: if it fails, closing the stream does not complete the upload, and what was there stays.
    with store.open_output_stream(path) as stream:
        stream.write(content)


def write_all(number: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(number, content, offset)
        content, offset = content[written:], offset + written


def check_bucket(store: fs.FileSystem, path: str) -> None:
    """S3 says of an object in a missing bucket only that the object is missing."""
    bucket = path.partition("/")[0]
    if store.type_name == "s3" and (
        patiently(partial(store.get_file_info, bucket), bucket).type == fs.FileType.NotFound
    ):
        raise InputError(no_bucket(path))
