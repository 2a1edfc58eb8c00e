"""Objects on S3: what s3fs leaves open.

botocore repeats a request that met a 5xx, a throttle, a reset or a timeout, with exponential backoff and full
jitter: `client_options` sets that up. Two things are beyond it: a body that breaks off after the answer has begun,
and a conditional write whose answer is lost, so that its repetition fails by its own success.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
from botocore import exceptions as boto
from fsspec.asyn import sync

FAILURES = (OSError, boto.BotoCoreError, boto.ClientError, aiohttp.ClientError)

# One PUT appears whole or not at all. The parts of a multipart upload that was killed stay, unseen and paid for.
ONE_PUT_BYTES = 2**30
MAX_PAUSE_S = 20.0

_REFUSED_CONDITION = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey"}
_TIMEOUTS = (boto.ReadTimeoutError, boto.ConnectTimeoutError, TimeoutError)
_CONNECTION = (boto.ConnectionError, boto.HTTPClientError, aiohttp.ClientError, ConnectionError)
# What a body can meet after its answer has begun; botocore does not repeat these.
_BROKEN_BODY = (
    aiohttp.ClientError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    OSError,
)
_NO_CREDENTIALS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)


class CutShortError(OSError):
    """A body that is not as long as what was asked for, again and again."""


class TooShortError(OSError):
    """An object that ends before the range that was asked for."""


def client_options(options: Mapping[str, Any], retries: int, timeout_s: float) -> dict[str, Any]:
    """Return the arguments of an `s3fs.S3FileSystem` that repeats requests within bounds and caches no listing."""
    config = {
        "connect_timeout": timeout_s,
        "read_timeout": timeout_s,
        "retries": {"mode": "standard", "total_max_attempts": retries + 1},
        **options.get("config_kwargs", {}),
    }
    return {"use_listings_cache": False, **options, "config_kwargs": config}


class S3Objects:
    """Reads, writes and conditional writes through one `s3fs.S3FileSystem` made with `client_options`.

    Args:
        fs: The file system.
        retries: How often a failed body or a disputed conditional write is tried again.
        timeout_s: The time the client waits for an answer; error messages name it.
    """

    def __init__(self, fs: Any, retries: int, timeout_s: float) -> None:
        self._fs = fs
        self._retries = retries
        self._timeout_s = timeout_s
        fs.retries = 1  # s3fs would repeat, without jitter, what botocore has already repeated

    def get(self, path: str, start: int | None, end: int | None) -> bytes:
        """Return an object's bytes, or a range of them, never fewer than were asked for.

        Raises:
            FileNotFoundError: when there is no such object or bucket.
            TooShortError: when the object ends before the range does.
            OSError: or another of `FAILURES`, when the retries are spent.
        """
        return self._read(path, start, end)[0]

    def get_if_exists(self, path: str) -> bytes | None:
        """Return an object's bytes, or None when there is no such object.

        Raises:
            OSError: or another of `FAILURES`, when that cannot be known; also when the bucket is missing.
        """
        return self._read_if_there(path)[0]

    def put(self, path: str, data: bytes) -> None:
        """Write an object by one request.

        Raises:
            OSError: or another of `FAILURES`, when the retries are spent.
        """
        self._fs.pipe_file(path, data, chunksize=ONE_PUT_BYTES)

    def exists(self, path: str) -> bool:
        """Whether there is an object or a folder of that name.

        Raises:
            OSError: or another of `FAILURES`, when that cannot be known; also when the bucket is missing.
        """
        return self._info(path) is not None

    def size(self, path: str) -> int | None:
        """Return an object's bytes in number, or None when there is no such object.

        Raises:
            OSError: or another of `FAILURES`, when that cannot be known; also when the bucket is missing.
        """
        info = self._info(path)
        return int(info["size"]) if info is not None and info["type"] == "file" else None

    def _info(self, path: str) -> Mapping[str, Any] | None:
        try:
            info: Mapping[str, Any] = self._fs.info(path)
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise
            return None
        return info

    def honours_conditions(self, path: str) -> bool:
        """Whether writing `path`, which exists, is refused on the condition that it does not, or is another.

        Raises:
            OSError: or another of `FAILURES`, when that cannot be known.
        """
        bucket, key, _ = self._fs.split_path(path)
        for condition in ({"IfNoneMatch": "*"}, {"IfMatch": f'"{"0" * 32}"'}):
            try:
                self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=b"", **condition)
            except FAILURES as error:
                if not _is_refused(error):
                    raise
            else:
                return False
        return True

    def swap(self, path: str, expected: bytes | None, new: bytes) -> bool:
        """Replace an object if its bytes are `expected` (None: if there is none); whether that was done.

        A write whose answer was lost counts as done when the object then holds `new`.

        Raises:
            OSError: or another of `FAILURES`, when the retries are spent.
        """
        current, tag = self._read_if_there(path)
        if current != expected:
            return False
        bucket, key, _ = self._fs.split_path(path)
        for attempt in range(self._retries + 1):
            condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": tag}
            try:
                self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=new, **condition)
                return True
            except FAILURES as error:
                refused = _is_refused(error)
                if not refused and not _is_transient(error):
                    raise
                # What the object holds now tells a lost answer from a lost race.
                current, tag = self._read_if_there(path)
                if current == new:
                    return True
                if current != expected:
                    return False
                if not refused:
                    raise
            _pause(attempt)
        raise OSError("its condition was refused again and again, and yet nobody changed it")

    def is_answer(self, error: BaseException) -> bool:
        """Whether a failure says how an object is, and not that the server could not be asked."""
        missing = isinstance(error, FileNotFoundError) and _code(error) != "NoSuchBucket"
        return missing or isinstance(error, TooShortError)

    def explain(self, error: BaseException) -> tuple[str, str]:
        """Say in a few words what failed, and what to do; nothing of the request is repeated, so no secret either."""
        code = _code(error)
        tries = f"after up to {self._retries + 1} tries"  # fewer when many requests at once have failed
        if isinstance(error, _NO_CREDENTIALS):
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile in storage.profile"
            return "no usable AWS credentials were found", remedy
        if isinstance(error, PermissionError):
            return f"access denied ({code or 'no code'})", "check the credentials in the environment, and their rights"
        if code == "NoSuchBucket":
            return "there is no such bucket", "create it, or mend `store` in the configuration"
        if isinstance(error, FileNotFoundError):
            return "no such object", ""
        if isinstance(error, TooShortError):
            return str(error), "it was cut short; run `prag run` again, and restore the object if that does not make it"
        if isinstance(error, CutShortError):
            return f"{error}, {tries}", "check the network and whatever stands between here and the store"
        if isinstance(error, _TIMEOUTS):
            return f"no answer within {self._timeout_s:g} s, {tries}", "check the network, or raise storage.timeout_s"
        if isinstance(error, _CONNECTION):
            return f"the connection failed, {tries}", "check that the store is up, and storage.endpoint_url"
        if _status(error) >= 500:
            return (
                f"the server answered {_status(error)} ({code}), {tries}",
                "wait until the store is well, and run again",
            )
        return " ".join(str(error).split())[:200], "check the store and its settings under `storage`"

    def _read_if_there(self, path: str) -> tuple[bytes | None, str]:
        try:
            return self._read(path, None, None)
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise
            return None, ""

    def _read(self, path: str, start: int | None, end: int | None) -> tuple[bytes, str]:
        bucket, key, _ = self._fs.split_path(path)
        wanted: dict[str, str] = {}
        if start is not None or end is not None:
            wanted["Range"] = f"bytes={start or 0}-{'' if end is None else end - 1}"
        failure: BaseException | None = None
        for attempt in range(self._retries + 1):
            if attempt:
                _pause(attempt - 1)
            try:
                answer = self._fs.call_s3("get_object", Bucket=bucket, Key=key, **wanted)
            except OSError as error:
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
            size = str(answer.get("ContentRange", "")).rpartition("/")[2]  # of the object; only a range's answer has it
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
    # Full jitter: a thousand workers that failed together do not come back together.
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
