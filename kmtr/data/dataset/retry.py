"""Operations of object stores, tried again where that can help.

The S3 client tries a request 4 times (5xx, throttling, reset, cut, stalled; backoff with jitter), but its retries come
from a quota of 100 that an outage under many reads in flight exhausts, and other stores' clients differ. So every
operation is tried up to 5 times within a minute on top of that; reads through `files.File.native` are not. What no
retry mends (missing, refused, wrong bucket) is said at once.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from itertools import count
from typing import TypeVar

from kmtr.types import InputError, KmtrError, first_line

T = TypeVar("T")

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
