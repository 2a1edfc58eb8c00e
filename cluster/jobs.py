"""Submit jobs to the job server of a Ray cluster and follow their output. Knows nothing of passages."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


# How long the job server may be unreachable while a job is followed: restarting a head takes a minute.
SERVER_TIMEOUT_S = 180.0
_POLL_S = 1.0


class JobServerError(Exception):
    """The job server cannot be reached, or refused a request."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job on the cluster; `new` says whether this call started it or found it running."""

    id: str
    new: bool


@dataclass(frozen=True)
class JobEnd:
    """How a job ended: Ray's status and message, and the exit code of the job's own process."""

    status: str
    message: str
    exit_code: int


def connect(address: str) -> JobSubmissionClient:
    """Return a client of the job server at a URL such as http://127.0.0.1:8265.

    Raises:
        JobServerError: when no server answers there, or it refuses the token.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # The client prefers these variables to its argument.
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise JobServerError(f"the job server at {address} refuses the token: {_first_line(error)}") from None
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:  # ValueError: it is no URL
        raise JobServerError(f"no job server answers at {address}: {_first_line(error)}") from None


def submit(
    client: JobSubmissionClient, name: str, entrypoint: str, folder: Path, environment: Mapping[str, str]
) -> SubmittedJob:
    """Start a job, or return the running job of this name.

    The first job has the id `name`; each later one, after the last has ended, has `name-2`, `name-3`, … Ids are never
    reused, so if two callers submit at once, one starts the job and the other finds it.

    Args:
        client: From `connect`.
        name: The name of the work, of letters, digits and dashes; the same work must have the same name.
        entrypoint: The command line.
        folder: The job's working directory; it is copied to each node.
        environment: Variables for the job and its workers.

    Raises:
        JobServerError: when the server cannot be reached or refuses the job.
    """
    pattern = re.compile(rf"{re.escape(name)}(?:-(\d+))?")
    try:
        attempts = {}
        for job in client.list_jobs():
            if found := pattern.fullmatch(job.submission_id or ""):
                attempts[int(found[1] or 1)] = job
        last = max(attempts, default=0)
        if last and not attempts[last].status.is_terminal():
            return SubmittedJob(str(attempts[last].submission_id), new=False)
        id = name if last == 0 else f"{name}-{last + 1}"
        runtime_env: dict[str, Any] = {"working_dir": str(folder), "env_vars": dict(environment)}
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=id, runtime_env=runtime_env)
        except RuntimeError as error:
            if "already exists" in str(error):
                return SubmittedJob(id, new=False)
            raise
    except (ConnectionError, RuntimeError, OSError) as error:
        raise JobServerError(_first_line(error)) from None
    return SubmittedJob(id, new=True)


def follow(client: JobSubmissionClient, id: str, write: Callable[[str], None]) -> JobEnd:
    """Write a job's output from its beginning as it comes, and return how the job ended.

    A job may be silent as long as the job server says that it runs. If the server does not answer, it is tried again
    for `SERVER_TIMEOUT_S`.

    Raises:
        JobServerError: when the server does not answer for that long, or no longer knows the job.
    """
    import aiohttp

    shown, heard = 0, time.monotonic()

    async def tail() -> None:
        nonlocal shown, heard
        seen = 0  # each connection starts again at the beginning of the output
        async for text in client.tail_job_logs(id):
            heard = time.monotonic()
            fresh = text[max(0, shown - seen) :]
            seen += len(text)
            if fresh:
                write(fresh)
                shown = seen

    while True:
        complete = False
        # A proxy may cut a silent stream, so the end of the stream does not mean the end of the job.
        with contextlib.suppress(RuntimeError, OSError, aiohttp.ClientError):
            asyncio.run(tail())
            complete = True
        try:
            job = client.get_job_info(id)
            heard = time.monotonic()
        except (RuntimeError, OSError) as error:
            if "does not exist" in str(error) or time.monotonic() - heard > SERVER_TIMEOUT_S:
                raise JobServerError(f"job {id}: {_first_line(error)}") from None
        else:
            if job.status.is_terminal():
                with contextlib.suppress(RuntimeError, OSError):
                    # The end of the output, if the stream was cut before it.
                    if rest := "" if complete else client.get_job_logs(id)[shown:]:
                        write(rest)
                failed = 0 if job.status.name == "SUCCEEDED" else 1
                code = job.driver_exit_code if job.driver_exit_code is not None else failed
                return JobEnd(job.status.name, str(job.message or ""), code if code > 0 else failed)
        time.sleep(_POLL_S)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
