"""Starting and stopping Ray: the only place that calls `ray.init`."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from cluster.resources import Profile

# For the driver and its workers. Nothing tells anybody anything.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class JoinError(Exception):
    """The cluster that RAY_ADDRESS names is out of reach, or runs another version of Ray or Python."""

    remedy = "check RAY_ADDRESS, that the cluster runs, and that Ray and Python are of the same versions there and here"


def is_passed_on(name: str) -> bool:
    """Whether the workers of a cluster that is joined get a variable of the driver's environment.

    Secrets they do not get: Ray writes what it passes on into its logs. A cluster's nodes have their own.
    """
    return name.startswith(("HF_", "PRAG_", "AWS_")) and not any(word in name for word in ("KEY", "SECRET", "TOKEN"))


@contextlib.contextmanager
def ray_session(profile: Profile) -> Iterator[None]:
    """Within this context Ray runs: the cluster that RAY_ADDRESS names, or one started here and stopped after.

    An error that a worker raised leaves this context as it was raised there. Ray's own progress bars and start-up
    messages are off: the job reports its progress itself.

    Raises:
        JoinError: when there is a cluster to join, and it cannot be joined.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    import ray
    import ray.data
    import ray.exceptions

    if os.environ.get("RAY_ADDRESS"):
        passed_on = {name: value for name, value in os.environ.items() if is_passed_on(name)}
        # A job of the job server has an environment already; where both name a variable, Ray refuses by default.
        os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
        environment = {"env_vars": {**passed_on, **{name: os.environ[name] for name in ENVIRONMENT}}}
        try:
            ray.init(runtime_env=environment, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            ray.shutdown()  # of what was begun
            raise JoinError(" ".join(str(error).split())) from None
    else:
        # An idle worker is ended after a second by default, and starting the next one takes several.
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
        # Workers inherit this process's environment. A runtime_env would make Ray start each of them anew.
        # `local`: without it Ray would join whatever cluster was started last on this machine.
        ray.init(
            "local",
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
        # A step of training may take long, and no block moves meanwhile.
        context.execution_no_progress_timeout_s = 4 * 3600
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        yield
    except ray.exceptions.RayTaskError as error:
        # What a worker raised is raised here as it was, without the frames of Ray between.
        cause = error.cause
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        raise cause from None
    finally:
        ray.shutdown()
