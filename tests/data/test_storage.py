"""Datasets on an object store are read as from a disk: through failures, from several processes, in bounded space.

The store is a real S3 API server on loopback; failures are put before it, on the wire.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cohort import simulated, write

from kmtr.config import RunConfig
from kmtr.data.dataset import cache as cached_files
from kmtr.data.dataset import record, shards, storage
from kmtr.data.dataset.cache import Cache, open_file
from kmtr.data.dataset.files import read_many
from kmtr.data.dataset.manifest import has_dataset, preflight, read_manifest, write_manifest
from kmtr.data.dataset.reader import Dataset, Reader
from kmtr.data.dataset.storage import StoreError, open_root
from kmtr.types import InputError

CONTENT = np.random.default_rng(0).bytes(300_000)
CACHED = 100_000
"""Bytes of a file in the tests of the cache; `CACHED / GIB` is its size there."""
GIB = 2**30


# ------------------------------------------------------------------------------------------------------------ server


@dataclass
class Failures:
    """A WSGI layer that lets the next `left` requests fail in one `way`, of those that begin with one of `methods`
    (a method, or with the query or the path behind it).
    """

    serve: Callable[..., Iterable[bytes]]
    way: str = ""
    left: int = 0
    methods: tuple[str, ...] = ()
    seen: list[str] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def next(self, left: int, way: str, *methods: str) -> None:
        self.way, self.left, self.methods = way, left, methods
        self.seen.clear()

    def __call__(self, request: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        with self.lock:
            method = request["REQUEST_METHOD"]
            self.seen.append(method)
            lines = (f"{method} {request['QUERY_STRING']}", f"{method} {request['PATH_INFO']}")
            fails = self.left > 0 and any(line.startswith(self.methods) for line in lines)
            self.left -= fails
        if not fails:
            return self.serve(request, start)
        if method == "PUT":
            for _ in iter(lambda: request["wsgi.input"].read(1 << 20), b""):
                pass
        if self.way == "reset":
            connection = request["werkzeug.socket"]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        if self.way == "cut":
            whole = b"".join(self.serve(request, start))
            return [whole[: len(whole) // 2]]
        if self.way == "stall":
            time.sleep(storage.S3_STALLED_S + 2)
            return self.serve(request, start)
        status, _, code = self.way.partition(" ")
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>-</Message></Error>".encode()
        start(f"{status} {code}", [("Content-Length", str(len(body)))])
        return [] if method == "HEAD" else [body]


@dataclass(frozen=True)
class Server:
    endpoint: str
    failures: Failures

    def root(self, bucket: str, prefix: str = "set") -> str:
        """URI of a new bucket."""
        uri = f"s3://{bucket}/{prefix}"
        open_root(f"{uri}?allow_bucket_creation=true")
        return uri

    def put(self, root: str, name: str, content: bytes = CONTENT) -> None:
        store, base = open_root(root)
        storage.write_atomic(store, f"{base}/{name}", content)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("moto", reason="needs moto (the extra dev): a server of the S3 API")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: object) -> None: ...

    failures = Failures(DomainDispatcherApplication(create_backend_app))
    running = make_server("127.0.0.1", 0, failures, threaded=True, request_handler=Quiet)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        endpoint = f"http://127.0.0.1:{running.server_port}"
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield Server(endpoint, failures)
    running.shutdown()


@pytest.fixture
def failures(server: Server) -> Iterator[Failures]:
    yield server.failures
    server.failures.next(0, "")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores opened in this test have clients that do not retry, so that what we add is seen."""
    monkeypatch.setattr(storage, "S3_TRIES", 1)
    storage._s3.cache_clear()
    monkeypatch.setattr(storage.random, "uniform", lambda low, high: 0.02)


@pytest.fixture(autouse=True)
def clients_of_their_own() -> Iterator[None]:
    yield
    storage._s3.cache_clear()


# ------------------------------------------------------------------------------------------------------------ dataset


def test_a_dataset_on_s3_reads_as_from_disk(server: Server, small: RunConfig, tmp_path: Path) -> None:
    studies = {"train": [simulated(i, small) for i in range(5)], "val": [simulated(5, small)]}
    local, remote = str(tmp_path), server.root("dataset", "a/b")
    here = write(tmp_path, studies, rows=2)
    parts = [
        shards.write_shard(remote, f"{split}-{start // 2:05d}", split, rows[start : start + 2], "float16")
        for split, rows in studies.items()
        for start in range(0, len(rows), 2)
    ]
    there = write_manifest(remote, parts, "float16", "test")
    assert (there.digest, read_manifest(remote)) == (here.digest, there)
    assert has_dataset(remote)
    assert shards.finished_shard(remote, "train-00000") == parts[0]
    assert shards.finished_shard(remote, "train-00009") is None
    preflight(remote, there)
    columns = record.columns_of(small.data.views)
    tables = [Reader(Dataset.of(root), "train", columns).read([4, 0, 3]) for root in (local, remote)]
    assert tables[0].equals(tables[1])
    reader = pickle.loads(pickle.dumps(Reader(Dataset.of(remote), "val", columns)))
    assert len(reader.read([0])) == 1


def test_an_epoch_of_a_cached_dataset_fetches_each_shard_once(
    server: Server, failures: Failures, small: RunConfig, tmp_path: Path
) -> None:
    root = server.root("epochs")
    studies = [simulated(i, small) for i in range(4)]
    parts = [shards.write_shard(root, f"train-{i:05d}", "train", [study], "float16") for i, study in enumerate(studies)]
    write_manifest(root, parts, "float16", "test")

    def epoch(seed: int) -> list[bytes]:
        reader = Reader(Dataset.of(root), "train", cache=str(tmp_path), cache_gib=1.0)
        order = np.random.default_rng(seed).permutation(4)
        samples = reader.samples(order)
        shape = studies[0].views["sax"].kspace.shape
        return [samples.fetch(int(at), "sax", shape).tobytes() for at in np.argsort(order)]

    first = epoch(0)
    assert cached(tmp_path) == 4
    failures.next(1000, "503 SlowDown", "GET /epochs/set/shards/train-00000.parquet")
    assert epoch(1) == first
    assert failures.left == 1000


def test_a_truncated_shard_is_found(server: Server, small: RunConfig) -> None:
    root = server.root("truncated")
    part = shards.write_shard(root, "train-00000", "train", [simulated(0, small)], "float16")
    manifest = write_manifest(root, [part], "float16", "test")
    store, base = open_root(root)
    content = storage.read_bytes(store, f"{base}/{part[0].name}")
    storage.write_atomic(store, f"{base}/{part[0].name}", content[:-1000])
    with pytest.raises(InputError, match="truncated or changed"):
        preflight(root, manifest)
    with pytest.raises(EOFError, match=f"train-00000.parquet: expected {part[0].bytes} bytes, got .*: truncated"):
        open_file(root, part[0].name, size=part[0].bytes)


# -------------------------------------------------------------------------------------------------------------- roots


def test_one_file_system_per_store(server: Server, tmp_path: Path) -> None:
    root = server.root("roots")
    assert open_root(root)[0] is open_root("s3://roots/other/")[0]
    assert open_root("s3://roots/other/")[1] == "roots/other"
    assert open_root(str(tmp_path))[0] is open_root("elsewhere")[0]


def test_a_uri_may_say_where_its_store_is(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.put(server.root("query"), "x", b"1")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    host = server.endpoint.removeprefix("http://")
    for options in (f"endpoint_override={host}&scheme=http", f"endpoint_override={server.endpoint}&region=eu-west-1"):
        with open_file(f"s3://query/set?{options}", "x") as file:
            assert file.size == 1
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert open_file("s3://query/set", "x").size == 1


def test_what_pyarrow_does_not_know_is_left_to_fsspec() -> None:
    store, base = open_root("memory://somewhere/deep/")
    storage.make_folder(store, base)
    storage.write_atomic(store, f"{base}/x", CONTENT)
    storage.write_atomic(store, f"{base}/x", CONTENT)
    assert storage.exists(store, f"{base}/x")
    assert storage.read_bytes(store, f"{base}/x") == CONTENT
    with open_file("memory://somewhere/deep", "x") as file:
        assert file.read_at(1000, 500).to_pybytes() == CONTENT[1000:1500]
    assert [info.base_name for info in store.get_file_info(pa.fs.FileSelector(base))] == ["x"]
    with pytest.raises(FileNotFoundError, match="expected an object, got none"):
        open_file("memory://somewhere", "y")


@pytest.mark.parametrize(
    ("root", "says"),
    [
        ("nowhere://x", "nowhere://x: expected a path or an object-store URI, got: Protocol not known: nowhere"),
        ("s3://", "expected s3://bucket/prefix, got no bucket"),
        ("s3://me:secret@bucket/x?wrong=1", "^s3://bucket/x.wrong=1: unknown option 'wrong', expected one of region,"),
        ("s3://bucket/x?endpoint_override=here&scheme=ftp", "Invalid S3 connection scheme 'ftp'"),
    ],
)
def test_a_root_that_is_none_is_one_line(root: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as raised:
        open_root(root)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("large", [False, True])
def test_an_object_is_there_whole_or_not_at_all(server: Server, failures: Failures, large: bool) -> None:
    root = server.root("whole")
    old, new = b"1" * 1000, CONTENT * (50 if large else 1)  # one part or several
    server.put(root, "x", old)
    begin, part, end = "POST uploads", "PUT partNumber=2" if large else "PUT partNumber=1", "POST uploadId="
    for request in (begin, part, end):
        failures.next(1, "403 AccessDenied", request)
        with pytest.raises(InputError, match="lets us in"):
            server.put(root, "x", new)
        assert failures.left == 0
        with open_file(root, "x") as file:
            assert file.read_at(0, file.size).to_pybytes() == old
    server.put(root, "x", new)
    with open_file(root, "x") as file:
        assert file.read_at(0, file.size).to_pybytes() == new


def test_a_local_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, base = open_root(str(tmp_path))
    path = f"{base}/x"
    storage.write_atomic(store, path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", partial(_no_space))
        with pytest.raises(OSError, match="No space"):
            storage.write_atomic(store, path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert storage.read_bytes(store, path) == b"old"
    storage.write_atomic(store, path, b"new")
    assert storage.read_bytes(store, path) == b"new"


@pytest.mark.parametrize("where", ["local", "s3", "memory"])
def test_a_file_that_grows_is_published_at_its_end_only(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = {"local": str(tmp_path / "new"), "memory": "memory://grows/new"}.get(where)
    root = root or request.getfixturevalue("server").root("grows")

    def grow(content: bytes, stop: bool = False) -> None:
        with storage.writing(root, "folder/x") as file:
            file.write(content)
            assert not stop
            file.write(content)

    with pytest.raises(AssertionError):
        grow(b"old", stop=True)
    assert not storage.exists(*_path(root, "folder/x"))
    grow(b"old")
    with pytest.raises(AssertionError):
        grow(CONTENT, stop=True)
    assert storage.read_bytes(*_path(root, "folder/x")) == b"oldold"
    grow(CONTENT * 20)  # several parts
    store, base = open_root(root)
    assert storage.read_bytes(store, f"{base}/folder/x") == CONTENT * 40
    found = [i for i in store.get_file_info(pa.fs.FileSelector(f"{base}/folder")) if i.type == pa.fs.FileType.File]
    assert [info.base_name for info in found] == ["x"]


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("way", ["503 SlowDown", "500 InternalError", "429 TooManyRequests", "reset"])
def test_transient_failures_are_retried(
    server: Server, failures: Failures, hasty: None, way: str, request: pytest.FixtureRequest
) -> None:
    root = server.root("transient")
    for step, methods in (
        (lambda: server.put(root, "x"), ("PUT",)),
        (lambda: open_file(root, "x"), ("HEAD",)),
        (lambda: storage.exists(*_path(root, "x")), ("HEAD",)),
        (lambda: storage.read_bytes(*_path(root, "x")), ("HEAD", "GET")),
    ):
        failures.next(3, way, *methods)
        step()
        assert failures.left == 0, methods
    with open_file(root, "x") as file:
        failures.next(4, way, "GET")
        assert file.read_at(10, 1000).to_pybytes() == CONTENT[10:1010]
        assert failures.seen == ["GET"] * 5


def _path(root: str, name: str) -> tuple[Any, str]:
    store, base = open_root(root)
    return store, f"{base}/{name}"


def test_the_client_itself_retries_what_goes_through_native(server: Server, failures: Failures) -> None:
    root = server.root("native")
    server.put(root, "x")
    with open_file(root, "x") as file:
        failures.next(1, "cut", "GET")
        assert file.native().read_at(1000, 0) == CONTENT[:1000]
        assert failures.seen == ["GET", "GET"]


@pytest.mark.usefixtures("hasty")
def test_a_stalled_read_is_given_up_and_tried_again(
    server: Server, failures: Failures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "S3_STALLED_S", 1.0)
    root = server.root("stalled")
    server.put(root, "x")
    with open_file(root, "x") as file:
        failures.next(1, "stall", "GET")
        assert file.read_at(0, 10).to_pybytes() == CONTENT[:10]
        assert failures.seen[:2] == ["GET", "GET"], "the first would have been answered later"


def test_many_reads_in_flight_outlive_the_clients_quota_of_retries(
    server: Server, failures: Failures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "S3_TRIES", 3)
    monkeypatch.setattr(storage, "TRIES", 12)  # the 175 fall on the reads by chance: none may meet its last by bad luck
    root = server.root("quota")
    server.put(root, "x")
    into = [bytearray(1000) for _ in range(60)]
    with open_file(root, "x") as file:
        failures.next(175, "reset", "GET")  # more than the client's 60 first tries and 100 retries
        read_many([(file, 1000 * i, target) for i, target in enumerate(into)], threads=60)
    assert b"".join(into) == CONTENT[:60_000]
    assert failures.left == 0


@pytest.mark.usefixtures("hasty")
def test_a_store_that_stays_down_is_one_line(server: Server, failures: Failures) -> None:
    root = server.root("down")
    server.put(root, "x")
    failures.next(1000, "503 SlowDown", "GET")
    says = r"^down/set/x: the store failed 5 times in \d s, last: AWS Error S(LOW_DOWN|ERVICE_UNAVAILABLE)"
    with pytest.raises(StoreError, match=says) as raised:
        open_file(root, "x").read_at(0, 1000)
    assert failures.seen.count("GET") == storage.TRIES
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "way", ["403 InvalidAccessKeyId", "403 SignatureDoesNotMatch", "403 AccessDenied", "400 ExpiredToken"]
)
def test_wrong_credentials_are_said_at_once(server: Server, failures: Failures, way: str) -> None:
    root = server.root("refused")
    server.put(root, "x")
    for step, methods in (
        (lambda: server.put(root, "y"), ("PUT",)),
        (lambda: open_file(root, "x").read_at(0, 1000), ("GET",)),
    ):
        failures.next(100, way, *methods)
        with pytest.raises(InputError, match="check the credentials") as raised:
            step()
        assert failures.left == 99
        assert "\n" not in str(raised.value)
    failures.next(100, "403 Forbidden", "HEAD")
    for step in (lambda: open_file(root, "x"), lambda: read_manifest(root)):
        with pytest.raises(InputError, match="check the credentials"):
            step()
    assert failures.left == 98


def test_what_is_not_there_is_said_at_once(server: Server, failures: Failures) -> None:
    root = server.root("missing")
    failures.next(0, "")
    with pytest.raises(FileNotFoundError, match="missing/set/x: expected an object, got none"):
        open_file(root, "x")
    assert not storage.exists(*_path(root, "x"))
    for step in (
        lambda: open_file("s3://nosuchbucket/set", "x"),
        lambda: read_manifest("s3://nosuchbucket/set"),
        lambda: server.put("s3://nosuchbucket/set", "x"),
        lambda: storage.make_folder(*open_root("s3://nosuchbucket/set")),
    ):
        with pytest.raises(InputError, match="nosuchbucket: expected a bucket, got none of that name") as raised:
            step()
        assert "\n" not in str(raised.value)
    assert len(failures.seen) < 20


# -------------------------------------------------------------------------------------------------------------- ranges


@pytest.fixture(params=["local", "s3"])
def somewhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A root that has CONTENT under the name x."""
    if request.param == "local":
        (tmp_path / "x").write_bytes(CONTENT)
        return str(tmp_path)
    server: Server = request.getfixturevalue("server")
    root = server.root("ranges")
    server.put(root, "x")
    return root


def test_ranges_are_read_in_place_by_many_threads(somewhere: str) -> None:
    with open_file(somewhere, "x") as file:
        assert file.size == len(CONTENT)
        whole = np.zeros(150_000, np.float16)
        step = 10_000
        read_many([(file, 2 * i, whole[i : i + step]) for i in range(0, len(whole), step)], threads=4)
        assert whole.tobytes() == CONTENT
        assert file.read_at(7, 5).to_pybytes() == CONTENT[7:12]
        assert file.read_at(len(CONTENT), 0).size == 0
        file.read_into(0, np.empty((0, 3)))
        native = file.native()
        assert native.size() == len(CONTENT)
        assert native.read_at(5, 9) == CONTENT[9:14]


def test_a_short_read_is_an_error_and_no_read_outlives_it(somewhere: str) -> None:
    with open_file(somewhere, "x") as file:
        for step in (
            lambda: file.read_at(len(CONTENT) - 5, 10),
            lambda: file.read_into(len(CONTENT) - 5, bytearray(10)),
            lambda: read_many([(file, len(CONTENT) * (i % 2), bytearray(10)) for i in range(20)], threads=4),
        ):
            with pytest.raises(EOFError, match=r"x: expected 10 bytes at \d+, got the end of the file at 300000"):
                step()


def test_a_local_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(CONTENT)
    with open_file(str(tmp_path), "x") as file:
        os.truncate(tmp_path / "x", 1000)
        with pytest.raises(EOFError, match="expected 2000 bytes at 0"):
            file.read_at(0, 2000)


def test_footers_are_read_through_native(somewhere: str, tmp_path: Path) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1, 2, 3]}), sink)
    store, base = open_root(somewhere)
    storage.write_atomic(store, f"{base}/t.parquet", sink.getvalue().to_pybytes())
    with open_file(somewhere, "t.parquet") as file:
        assert pq.ParquetFile(file.native()).read()["a"].to_pylist() == [1, 2, 3]


def test_a_dropped_file_is_closed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        open_file(str(tmp_path), "x")
    assert len(os.listdir("/dev/fd")) <= before + 1


# --------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def stored(server: Server, request: pytest.FixtureRequest) -> str:
    """A root with files f0 to f5 of CACHED bytes, each of another value."""
    root = server.root("cached-" + re.sub("[^a-z]", "", request.node.name)[:40])
    for i in range(6):
        server.put(root, f"f{i}", bytes([i]) * CACHED)
    return root


def cache_of(folder: Path, files: float) -> Cache:
    return Cache(str(folder), files * CACHED / GIB)


def fetch(root: str, cache: Cache, number: int) -> None:
    with open_file(root, f"f{number}", cache, CACHED) as file:
        assert file.read_at(0, CACHED).to_pybytes() == bytes([number]) * CACHED


def cached(folder: Path) -> int:
    """Number of whole files; nothing else may be left but empty locks."""
    assert {path.suffix for path in folder.iterdir()} <= {".file", ".lock"}
    assert not sum(path.stat().st_size for path in folder.glob("*.lock"))
    return len(list(folder.glob("*.file")))


def test_a_cached_file_is_fetched_once(stored: str, failures: Failures, tmp_path: Path) -> None:
    cache = pickle.loads(pickle.dumps(cache_of(tmp_path, 3)))
    fetch(stored, cache, 0)
    failures.next(0, "")
    fetch(stored, cache, 0)
    assert failures.seen == []
    with open_file(stored, "f0", cache) as file:
        assert file.size == CACHED
    assert set(failures.seen) == {"HEAD"}  # asked for the size only


def test_least_recently_used_goes_first(stored: str, failures: Failures, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 2.5)
    for number in (0, 1, 0, 2):
        fetch(stored, cache, number)
        assert cached(tmp_path) <= 2
    failures.next(0, "")
    fetch(stored, cache, 0)
    fetch(stored, cache, 2)
    assert failures.seen == []
    fetch(stored, cache, 1)
    assert "GET" in failures.seen


def test_open_files_stay_and_what_has_no_room_is_read_from_the_store(stored: str, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 2)
    held = [open_file(stored, f"f{i}", cache, CACHED) for i in range(2)]
    fetch(stored, cache, 2)
    assert cached(tmp_path) == 2
    for i, file in enumerate(held):
        assert file.read_at(5, 1).to_pybytes() == bytes([i])
        file.close()
        file.close()
    fetch(stored, cache, 2)
    assert cached(tmp_path) == 2
    assert not cached_files._opened


def test_a_rewritten_file_is_fetched_anew(server: Server, stored: str, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 3)
    open_file(stored, "f0", cache, CACHED, version="a").close()
    server.put(stored, "f0", b"z" * CACHED)
    with open_file(stored, "f0", cache, CACHED, version="b") as file:
        assert file.read_at(0, 1).to_pybytes() == b"z"
    server.put(stored, "f0", b"y" * 10)
    with open_file(stored, "f0", cache, 10) as file:
        assert file.read_at(0, 1).to_pybytes() == b"y"
    with pytest.raises(EOFError, match=f"f0: expected {CACHED} bytes, got 10"):
        open_file(stored, "f0", cache, CACHED, version="c")


def test_what_the_cache_refuses_is_one_line(stored: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"f0: expected files that fit into data.cache_gib=.*enlarge the cache"):
        open_file(stored, "f0", cache_of(tmp_path, 0.9), CACHED)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"data.cache=.*expected a local folder with room"):
        open_file(stored, "f0", cache_of(tmp_path / "file", 3), CACHED)
    with pytest.raises(FileNotFoundError, match="expected an object"):
        open_file(stored, "nothing", cache_of(tmp_path, 3), CACHED)


def test_local_files_are_never_cached(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(CONTENT)
    open_file(str(tmp_path), "x", Cache(str(tmp_path / "cache"), 1.0)).close()
    assert not (tmp_path / "cache").exists()


def test_threads_share_a_bounded_cache(stored: str, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 3)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: fetch(stored, cache, i % 6), range(60)))
    assert cached(tmp_path) <= 3
    assert not cached_files._opened


FETCH = """
import sys, time
from kmtr.data.dataset.cache import Cache, open_file
root, folder, gib, order = sys.argv[1:]
for number in order:
    with open_file(root, f"f{number}", Cache(folder, float(gib)), %d) as file:
        assert file.read_at(0, file.size).to_pybytes() == bytes([int(number)]) * file.size
"""


def spawn(root: str, cache: Cache, order: str) -> subprocess.Popen[bytes]:
    code = FETCH % CACHED
    return subprocess.Popen([sys.executable, "-c", code, root, cache.folder, str(cache.gib), order])


def test_processes_of_a_node_download_once(stored: str, failures: Failures, tmp_path: Path) -> None:
    failures.next(0, "")
    running = [spawn(stored, cache_of(tmp_path, 6), order) for order in ("012345", "543210", "301425")]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert failures.seen.count("GET") == 6
    assert cached(tmp_path) == 6


def test_processes_keep_the_bound(stored: str, tmp_path: Path) -> None:
    most = 0
    running = [spawn(stored, cache_of(tmp_path, 3), order * 2) for order in ("012345", "543210", "301425")]
    while any(process.poll() is None for process in running):
        with contextlib.suppress(FileNotFoundError):  # files come and go
            most = max(most, sum(path.stat().st_size for path in tmp_path.iterdir()))
        time.sleep(0.002)
    assert [process.wait() for process in running] == [0, 0, 0]
    assert most <= 4 * CACHED  # a listing is not a snapshot: a file may be seen under both its names
    assert cached(tmp_path) <= 3


def test_a_killed_download_leaves_nothing_in_the_way(
    server: Server, stored: str, failures: Failures, tmp_path: Path
) -> None:
    cache = cache_of(tmp_path, 1.5)
    failures.next(1, "stall", "GET")
    process = spawn(stored, cache, "0")
    deadline = time.monotonic() + 30
    while failures.left and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock"] == [".part"]
    fetch(stored, cache, 1)  # another file: what is left of the first is removed for it
    assert cached(tmp_path) == 1
    fetch(stored, cache, 0)
    assert cached(tmp_path) == 1


def test_a_torn_file_is_fetched_anew(stored: str, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 3)
    fetch(stored, cache, 0)
    os.truncate(next(tmp_path.glob("*.file")), 10)
    fetch(stored, cache, 0)
    assert cached(tmp_path) == 1
