"""Objects on S3, through s3fs, with two gaps closed; ranges through obstore, which is faster, if it can.

botocore repeats a request that met a 5xx, a throttle, a reset or a timeout, with exponential backoff and full
jitter. It does not repeat a request whose body breaks off after the answer has begun. And if the answer to a
conditional write is lost, botocore repeats the write, which then fails because the first one succeeded.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
import fsspec
from botocore import exceptions as boto
from fsspec.asyn import sync

from prag_core.config import s3_client_config
from prag_core.store.backend import TooShortError
from prag_core.store.filesystem import FilesystemBackend
from prag_core.store.range_reader import LARGEST_RANGE, RangeReader, can_read_ranges

FAILURES = (OSError, boto.BotoCoreError, boto.ClientError, aiohttp.ClientError)

# Up to this size an object is written by one PUT. If a multipart upload is killed, its parts stay: nobody sees them,
# but they are paid for.
ONE_PUT_BYTES = 2**30
MAX_PAUSE_S = 20.0

_REFUSED_CONDITION = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey"}
_TIMEOUTS = (boto.ReadTimeoutError, boto.ConnectTimeoutError, TimeoutError)
_CONNECTION = (boto.ConnectionError, boto.HTTPClientError, aiohttp.ClientError, ConnectionError)
# Failures of a body after its answer has begun; botocore does not repeat these.
_BROKEN_BODY = (
    aiohttp.ClientError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    OSError,
)
_NO_CREDENTIALS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)


class CutShortError(OSError):
    """The body of an answer was shorter than the range that was asked for, at every try."""


def open_s3(url: str, options: Mapping[str, Any], retries: int, timeout_s: float) -> S3Backend:
    """Return the backend for an S3 URL; see `prag_core.store.backends.open_backend` for the arguments."""
    options = dict(options)
    wants_obstore = options.pop("range_reads", "obstore") == "obstore"
    config = {**s3_client_config(retries, timeout_s), **options.get("config_kwargs", {})}
    fs, root = fsspec.core.url_to_fs(url, **{"use_listings_cache": False, **options, "config_kwargs": config})
    fs.retries = 1  # s3fs would repeat, without jitter, what botocore has already repeated
    ranges = None
    if wants_obstore and can_read_ranges(options):
        ranges = RangeReader(fs, fs.split_path(root)[0], options, timeout_s)
    return S3Backend(fs, root, retries, timeout_s, ranges)


class S3Backend(FilesystemBackend):
    """Objects below one prefix of an S3 bucket; see `Backend` for the methods.

    Promises:
        Atomic put: an object of up to 1 GiB is one PUT, a larger one a multipart upload; both appear whole.
        Durability: the server's.
        Conditional write: `swap` sends If-Match or If-None-Match, so it holds between all clients. Not every server
            obeys these headers; `honours_conditions` finds out.
        Failures: each request is repeated `retries` times at most, with pauses of up to 20 seconds.

    Args:
        fs: An `s3fs.S3FileSystem` that keeps no listings.
        root: Bucket and prefix.
        retries: How often a broken body or a disputed conditional write is tried again.
        timeout_s: How long the client waits for an answer; error messages name it.
        ranges: What reads ranges, or None for s3fs. What it cannot read is read by s3fs, with all retries.
    """

    failures = FAILURES

    def __init__(self, fs: Any, root: str, retries: int, timeout_s: float, ranges: RangeReader | None = None) -> None:
        super().__init__(fs, root)
        self._ranges = ranges
        self._retries = retries
        self._timeout_s = timeout_s

    def put(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(name), data, chunksize=ONE_PUT_BYTES)

    def get(self, name: str, start: int | None = None, end: int | None = None) -> bytes | None:
        if self._ranges is None or start is None or end is None or end - start > LARGEST_RANGE:
            return self._read(name, start, end)[0]
        data = self._ranges.read(self._fs.split_path(self._path(name))[1], start, end)
        if data is None:
            data = self._read(name, start, end)[0]
            if data is not None:
                self._ranges.pause()
        return data

    def size(self, name: str) -> int | None:
        info = self._info(name)
        return int(info["size"]) if info is not None and info["type"] == "file" else None

    def exists(self, name: str) -> bool:
        return self._info(name) is not None

    def swap(self, name: str, expected: bytes | None, new: bytes) -> bool:
        current, tag = self._read(name)
        if current != expected:
            return False
        for attempt in range(self._retries + 1):
            try:
                self._write_if(name, {"IfNoneMatch": "*"} if expected is None else {"IfMatch": tag}, new)
                return True
            except FAILURES as error:
                refused = _is_refused(error)
                if not refused and not _is_transient(error):
                    raise
                # A lost answer and a lost race look the same. The bytes of the object tell them apart: if it holds
                # `new`, our write was done.
                current, tag = self._read(name)
                if current == new:
                    return True
                if current != expected:
                    return False
                if not refused:
                    raise
            _pause(attempt)
        raise OSError("its condition was refused again and again, and yet nobody changed it")

    def honours_conditions(self, name: str) -> bool:
        for condition in ({"IfNoneMatch": "*"}, {"IfMatch": f'"{"0" * 32}"'}):
            try:
                self._write_if(name, condition, b"")
            except FAILURES as error:
                if not _is_refused(error):
                    raise
            else:
                return False
        return True

    def explain(self, error: Exception) -> tuple[str, str]:
        code = _code(error)
        tries = f"after up to {self._retries + 1} tries"  # fewer when many requests at once have failed
        if isinstance(error, _NO_CREDENTIALS):
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile in storage.profile"
            return "no usable AWS credentials were found", remedy
        if isinstance(error, PermissionError):
            return f"access denied ({code or 'no code'})", "check the credentials in the environment, and their rights"
        if code == "NoSuchBucket":
            return "there is no such bucket", "create it, or correct `store` in the configuration"
        if isinstance(error, CutShortError):
            return f"{error}, {tries}", "check the network and whatever stands between here and the store"
        if isinstance(error, _TIMEOUTS):
            return f"no answer within {self._timeout_s:g} s, {tries}", "check the network, or raise storage.timeout_s"
        if isinstance(error, _CONNECTION):
            return f"the connection failed, {tries}", "check that the store is up, and storage.endpoint_url"
        if _status(error) >= 500:
            cause = f"the server answered {_status(error)} ({code}), {tries}"
            return cause, "wait until the store is well, and run again"
        return " ".join(str(error).split())[:200], "check the store and its settings under `storage`"

    def _write_if(self, name: str, condition: Mapping[str, str], data: bytes) -> None:
        bucket, key, _ = self._fs.split_path(self._path(name))
        self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)

    def _info(self, name: str) -> Mapping[str, Any] | None:
        try:
            info: Mapping[str, Any] = self._fs.info(self._path(name))
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise
            return None
        return info

    def _read(self, name: str, start: int | None = None, end: int | None = None) -> tuple[bytes | None, str]:
        """Return the bytes of an object and its ETag; None and "" if there is no such object."""
        bucket, key, _ = self._fs.split_path(self._path(name))
        byte_range: dict[str, str] = {}
        if start is not None or end is not None:
            byte_range["Range"] = f"bytes={start or 0}-{'' if end is None else end - 1}"
        failure: BaseException | None = None
        for attempt in range(self._retries + 1):
            if attempt:
                _pause(attempt - 1)
            try:
                answer = self._fs.call_s3("get_object", Bucket=bucket, Key=key, **byte_range)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and _code(error) != "NoSuchBucket":
                    return None, ""
                if _code(error) == "InvalidRange":
                    raise TooShortError(f"it ends before byte {start}") from error
                raise
            try:
                data: bytes = sync(self._fs.loop, answer["Body"].read)
            except _BROKEN_BODY as error:
                failure = error
                continue
            finally:
                answer["Body"].close()
            # The size of the whole object, which only the answer to a range has.
            size = str(answer.get("ContentRange", "")).rpartition("/")[2]
            total = int(size) if size.isdigit() else None
            if total is not None and end is not None and total < end:
                raise TooShortError(f"it has {total} bytes, {end} were expected")
            stop = total if end is None else end
            if stop is None or len(data) == stop - (start or 0):
                return data, str(answer["ETag"])
            failure = CutShortError(f"{len(data)} bytes came of {stop - (start or 0)} that were asked for")
        if isinstance(failure, (CutShortError, *_TIMEOUTS)):
            raise failure
        raise CutShortError("its bytes broke off or were altered on the way") from failure


def _pause(attempt: int) -> None:
    # Full jitter: a thousand workers that failed at the same time do not all come back at the same time.
    time.sleep(random.uniform(0, min(MAX_PAUSE_S, 2.0**attempt)))


def _answer(error: BaseException) -> Mapping[str, Any]:
    for link in (error, error.__cause__):
        answer: Mapping[str, Any] | None = getattr(link, "response", None)
        if answer is not None:
            return answer
    return {}


def _code(error: BaseException) -> str:
    return str(_answer(error).get("Error", {}).get("Code", ""))


def _status(error: BaseException) -> int:
    return int(_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _is_refused(error: BaseException) -> bool:
    return isinstance(error, FileExistsError) or _code(error) in _REFUSED_CONDITION


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, _TIMEOUTS + _CONNECTION) or _status(error) >= 500
