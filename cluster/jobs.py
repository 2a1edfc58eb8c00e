"""Submitting to the job server of a Ray cluster, and following what was submitted. Knows nothing of passages."""

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


# How long the job server may be away while a job is followed: a head that is restarted takes a minute.
PATIENCE_S = 180.0
_PAUSE_S = 1.0


class JobServerError(Exception):
    """The job server cannot be reached, or refused what it was asked."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job on the cluster; `new` tells whether this call started it, or found it there."""

    id: str
    new: bool


@dataclass(frozen=True)
class JobEnd:
    """How a job ended: Ray's word for it, its message, and the exit code of the job's own process."""

    status: str
    message: str
    exit_code: int


def connect(address: str) -> JobSubmissionClient:
    """Return a client of the job server at an URL such as http://127.0.0.1:8265.

    Raises:
        JobServerError: when nobody answers there, or does not take the token.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # The client takes these before its argument.
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise JobServerError(f"the job server at {address} takes no such token: {_first_line(error)}") from None
    except (ConnectionError, RuntimeError, OSError) as error:
        raise JobServerError(f"no job server answers at {address}: {_first_line(error)}") from None


def submit(
    client: JobSubmissionClient, name: str, entrypoint: str, folder: Path, environment: Mapping[str, str]
) -> SubmittedJob:
    """Start a job, unless one of this name is under way: then return that.

    The first job has the id `name`, and each that follows an ended one `name-2`, `name-3`, …: ids are never used
    again, so of two callers at once one starts the job and the other one finds it.

    Args:
        client: From `connect`.
        name: What the job is, in letters, digits and dashes: whoever wants the same gives the same name.
        entrypoint: The command line.
        folder: Becomes the job's working directory, on each of its nodes.
        environment: Variables for the job and its workers.

    Raises:
        JobServerError: when the server cannot be reached or refuses the job.
    """
    of_this_name = re.compile(rf"{re.escape(name)}(?:-(\d+))?")
    try:
        attempts = {}
        for job in client.list_jobs():
            if found := of_this_name.fullmatch(job.submission_id or ""):
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
    """Write a job's output as it comes, from its beginning, until it ends; return how.

    A job may be silent for as long as the job server says that it runs, and a server that is away is waited for:
    `PATIENCE_S` at most without a word from it.

    Raises:
        JobServerError: when it stays away, or knows the job no more.
    """
    import aiohttp

    shown, heard = 0, time.monotonic()

    async def tail() -> None:
        nonlocal shown, heard
        seen = 0  # the server begins anew with each connection
        async for text in client.tail_job_logs(id):
            heard = time.monotonic()
            fresh = text[max(0, shown - seen) :]
            seen += len(text)
            if fresh:
                write(fresh)
                shown = seen

    while True:
        whole = False
        # A stream in which nothing is said may be cut by whatever lies between: the job is asked for below.
        with contextlib.suppress(RuntimeError, OSError, aiohttp.ClientError):
            asyncio.run(tail())
            whole = True
        try:
            job = client.get_job_info(id)
            heard = time.monotonic()
        except (RuntimeError, OSError) as error:
            if "does not exist" in str(error) or time.monotonic() - heard > PATIENCE_S:
                raise JobServerError(f"job {id}: {_first_line(error)}") from None
        else:
            if job.status.is_terminal():
                with contextlib.suppress(RuntimeError, OSError):
                    # Its last words, when every stream was cut before them.
                    if rest := "" if whole else client.get_job_logs(id)[shown:]:
                        write(rest)
                failed = 0 if job.status.name == "SUCCEEDED" else 1
                code = job.driver_exit_code if job.driver_exit_code is not None else failed
                return JobEnd(job.status.name, str(job.message or ""), code if code > 0 else failed)
        time.sleep(_PAUSE_S)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
