"""Ranges of S3 objects, read through obstore, which takes less time than s3fs for some hundred kilobytes.

Only the fast path is here: a range whose ends are known, and one try. Whatever goes wrong is left to s3fs, which
repeats requests and knows what an error means (`prag_core.store.s3`). A read that takes longer than 95 of 100 others is
asked for a second time while it is waited for, and the first answer counts: on S3 the slowest reads take ten times as
long as most, and rarely twice in a row (Dean and Barroso, The Tail at Scale, 2013).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import botocore.session
import obstore
from botocore.exceptions import BotoCoreError
from obstore.exceptions import BaseError
from obstore.store import S3Store

if TYPE_CHECKING:
    from obstore.store import ClientConfig

log = logging.getLogger(__name__)

# The most bytes of a range. obstore's time limit is for a whole answer, so a slow line would not bring more in time.
LARGEST_RANGE = 16 << 20
# After a read that s3fs could do and obstore could not, so long only s3fs is asked.
PAUSE_S = 60.0
# botocore renews credentials that expire, ten minutes before they do. obstore asks it again five minutes before this
# time is over.
_CREDENTIALS_S = 900
# What the settings can say and obstore is told. With any other argument of s3fs, obstore might ask another server.
_KNOWN = {"endpoint_url", "client_kwargs", "profile", "anon"}
_KNOWN_CLIENT = {"region_name"}
# The reads from whose times a slow one is told, the fewest of them, and the shortest time that counts as slow.
_REMEMBERED, _FEWEST, _SHORTEST_S = 200, 40, 0.02
# A server that is slow as a whole would get each read twice. So at most this share of all reads is asked for again.
_MOST_AGAIN = 0.1
_THREADS = 64


def can_read_ranges(options: dict[str, Any]) -> bool:
    """Return whether obstore can be told all that these arguments of `s3fs.S3FileSystem` say."""
    return options.keys() <= _KNOWN and options.get("client_kwargs", {}).keys() <= _KNOWN_CLIENT


class RangeReader:
    """Reads ranges of the objects of one bucket, with the endpoint, the region and the credentials of an s3fs client.

    Args:
        fs: An `s3fs.S3FileSystem`. It is asked for its endpoint and region at the first read.
        bucket: The bucket's name.
        options: The arguments that `fs` was made with; see `can_read_ranges`.
        timeout_s: How long a connection or an answer may take.
    """

    def __init__(self, fs: Any, bucket: str, options: dict[str, Any], timeout_s: float) -> None:
        self._fs = fs
        self._bucket = bucket
        self._options = options
        self._timeout = timedelta(seconds=timeout_s)
        self._paused_until = 0.0
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="range")
        self._lock = threading.Lock()
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._reads = 0
        self._asked_again = 0

    def read(self, key: str, start: int, end: int) -> bytes | None:
        """Return the bytes `start` to `end` of an object, or None if obstore has not got them: then ask s3fs."""
        if time.monotonic() < self._paused_until:
            return None
        begun = time.monotonic()
        pending = {self._threads.submit(self._read, key, start, end)}
        done, pending = wait(pending, self._patience())
        if pending and self._may_ask_again():
            pending.add(self._threads.submit(self._read, key, start, end))
        data = None
        while data is None and (done or pending):
            if not done:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
            data = done.pop().result()
        with self._lock:
            self._reads += 1
            self._seconds.append(time.monotonic() - begun)
        return data

    def pause(self) -> None:
        """Read nothing for a minute: s3fs had what this reader had not."""
        if time.monotonic() >= self._paused_until:
            log.warning("bucket %s: obstore has failed where s3fs has not; s3fs alone for %g s", self._bucket, PAUSE_S)
            self._paused_until = time.monotonic() + PAUSE_S

    def _read(self, key: str, start: int, end: int) -> bytes | None:
        try:
            data = bytes(obstore.get_range(self._store, key, start=start, end=end))
        except (BaseError, BotoCoreError, OSError, ValueError) as error:
            # Its text may hold what a server says of the signature.
            log.debug("obstore: %s: %s", key, type(error).__name__)
            return None
        return data if len(data) == end - start else None

    def _patience(self) -> float | None:
        """Return after how many seconds a read is slow; None if too few reads are known."""
        with self._lock:
            seconds = sorted(self._seconds)
        return max(_SHORTEST_S, seconds[int(0.95 * len(seconds))]) if len(seconds) >= _FEWEST else None

    def _may_ask_again(self) -> bool:
        with self._lock:
            allowed = self._asked_again < _MOST_AGAIN * self._reads
            self._asked_again += allowed
        return allowed

    @cached_property
    def _store(self) -> S3Store:
        session = botocore.session.Session(profile=self._options.get("profile"))
        meta = self._fs.s3.meta
        config: dict[str, Any] = {
            "region": meta.region_name or "us-east-1",
            "endpoint": meta.endpoint_url,  # also Amazon's, which may be another one than its region's first
            "virtual_hosted_style_request": False,
        }
        if self._options.get("anon"):
            config["skip_signature"] = True
        else:
            config["credential_provider"] = _Credentials(session)
        client: ClientConfig = {"connect_timeout": self._timeout, "timeout": self._timeout}
        if meta.endpoint_url.startswith("http://"):
            client["allow_http"] = True
        elif roots := session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE"):
            client["root_certificate"] = Path(roots).read_bytes()
        return S3Store(self._bucket, **config, client_options=client, retry_config={"max_retries": 0})


class _Credentials:
    """Gives obstore the credentials that botocore finds: from the environment, a profile or the machine's role."""

    def __init__(self, session: botocore.session.Session) -> None:
        self._session = session

    def __call__(self) -> dict[str, Any]:
        found = self._session.get_credentials()
        if found is None:
            raise ValueError("botocore finds no credentials")
        frozen = found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(seconds=_CREDENTIALS_S),
        }
