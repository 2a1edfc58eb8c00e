"""Starting and stopping Ray: the only place that calls `ray.init`."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cluster.resources import Profile

# For the driver and its workers: no usage statistics are sent to anybody.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


# Under Ray's folder a socket's path has up to 70 bytes more, and the system allows 107.
MAX_SOCKET_FOLDER_BYTES = 37
_SHORT_FOLDERS = ("/tmp", "/dev/shm", "/var/tmp")


class SessionError(Exception):
    """Ray cannot be used; `remedy` says what to do."""

    remedy = ""


class StartError(SessionError):
    """No folder of this machine can hold Ray's sockets."""

    remedy = f"set RAY_TMPDIR to a writable folder whose path is ASCII and has at most {MAX_SOCKET_FOLDER_BYTES} bytes"


class JoinError(SessionError):
    """The cluster that RAY_ADDRESS names cannot be reached, or runs another version of Ray or Python."""

    remedy = "check RAY_ADDRESS, that the cluster runs, and that Ray and Python have the same versions there and here"


def is_passed_on(name: str) -> bool:
    """Whether the workers of a joined cluster get this variable of the driver's environment.

    Secrets are not passed on: Ray writes the variables into its logs. The nodes of a cluster have their own.
    """
    return name.startswith(("HF_", "PRAG_", "AWS_")) and not any(word in name for word in ("KEY", "SECRET", "TOKEN"))


def socket_folder() -> str:
    """Return the folder for sockets: RAY_TMPDIR or TMPDIR if its path is short and ASCII, else a usual short one.

    A socket's path has a limit that a long TMPDIR exceeds, and Ray takes ASCII only. Files without such a limit stay
    in TMPDIR.

    Raises:
        StartError: when no folder is short, ASCII and writable.
    """
    folders = [folder for folder in (wanted_folder(), *_SHORT_FOLDERS) if folder]
    for folder in folders:
        if folder.isascii() and len(folder) <= MAX_SOCKET_FOLDER_BYTES and _can_hold_files(folder):
            return folder
    raise StartError(f"no folder can hold Ray's sockets: {', '.join(map(ascii, folders))}")


def wanted_folder() -> str:
    """Return the folder that RAY_TMPDIR, or else TMPDIR, names for Ray's files; empty if neither is set."""
    named = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR")
    return str(Path(named).absolute()) if named else ""


def _can_hold_files(folder: str) -> bool:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="prag-"):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def ray_session(profile: Profile) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or start Ray here, and leave or stop it at the end of the context.

    An error that a worker raised leaves this context as the worker raised it. Ray's progress bars and start-up
    messages are off, because the job reports its own progress.

    Raises:
        JoinError: when RAY_ADDRESS names a cluster that cannot be joined.
        StartError: when Ray cannot be started on this machine.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    import ray
    import ray.data
    import ray.exceptions

    # When the interpreter exits, a thread may still be at work in this context: Ray's end would fail it, and its next
    # call would start another Ray. Ray's processes end with this one anyway.
    atexit.unregister(ray.shutdown)
    if os.environ.get("RAY_ADDRESS"):
        passed_on = {name: value for name, value in os.environ.items() if is_passed_on(name)}
        # A job of the job server already has an environment; by default Ray refuses a variable that is in both.
        os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
        environment = {"env_vars": {**passed_on, **{name: os.environ[name] for name in ENVIRONMENT}}}
        try:
            ray.init(runtime_env=environment, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            ray.shutdown()  # what had started
            raise JoinError(" ".join(str(error).split())) from None
    else:
        # By default an idle worker ends after a second, and starting the next one takes several seconds.
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
        # Workers inherit this process's environment; with a runtime_env Ray would have to start new workers for it.
        # `local`: without it Ray would join the cluster that was started last on this machine.
        ray.init(
            "local",
            _temp_dir=f"{socket_folder()}/ray",
            num_cpus=profile.logical_cpus,
            object_store_memory=profile.object_store_bytes,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.default_hash_shuffle_parallelism = profile.partitions
        # A training step may take long, and no block moves meanwhile.
        context.execution_no_progress_timeout_s = 4 * 3600
        # By default Ray wraps an error of a worker in one of its own, and loses what it wrapped on the way here.
        context.raise_original_map_exception = True
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        yield
    except ray.exceptions.RayTaskError as error:
        # Raise the worker's own error, without the frames of Ray.
        cause = error.cause
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        raise cause from None
    finally:
        ray.shutdown()
