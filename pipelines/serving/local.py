"""Start and stop the Ray Serve application on this machine."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve import Application
from rich.console import Console

from cluster.preflight import on_cluster
from cluster.session import ray_session
from pipelines.execution.spinner import spinner
from pipelines.serving.deployment import APPLICATION, GRACE_S, application, logger
from pipelines.serving.dispatcher import longest_s
from pipelines.settings import profile_of
from prag_core.config import Config
from prag_core.errors import ConfigError, PragError
from prag_core.store.objects import open_store
from prag_core.store.snapshot import load_snapshot


def serve_here(config: Config, on_ready: Callable[[str], None], end: threading.Event, console: Console) -> None:
    """Serve on this machine, or on the cluster that RAY_ADDRESS names, until `end` is set.

    Requests under way are then still answered. On a cluster only the application is removed: Ray Serve and its other
    applications stay.

    Args:
        config: The configuration.
        on_ready: Called with the server's URL once it answers.
        end: Set by another thread when the server is to end.
        console: Where it shows that it is starting.

    Raises:
        ConfigError: when another server listens on `serve.port`; see also `application`.
        StoreError: when nothing is published yet.
        PragError: when no replica starts, with its error.
    """
    limits = config.serve
    made = application(config)
    alone = not on_cluster()
    if alone:
        check_port(limits.host, limits.port)
    load_snapshot(open_store(config))
    profile = profile_of(config)
    if profile.logical_cpus is not None:
        cpus = math.ceil(limits.max_replicas * profile.answer.cpus)
        profile = replace(profile, logical_cpus=max(profile.logical_cpus, cpus))
    with contextlib.ExitStack() as session:
        with spinner(console, "starting Ray and the first replica"):
            session.enter_context(ray_session(profile))
            start(config, made)
        on_ready(url_of(config))
        end.wait()
        stop()
        if alone:
            serve.shutdown()  # type: ignore[no-untyped-call]


def check_port(host: str, port: int) -> None:
    """Check that no other server listens on the port. Two would share it, and each would get some of the questions.

    Raises:
        ConfigError: when another server does, or this machine cannot listen there.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # SO_REUSEADDR allows for connections that have just ended. Ray Serve itself sets SO_REUSEPORT, so its own
        # start would not fail beside another listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            raise ConfigError(
                f"serve.port = {port}: cannot listen on {host}: {error.strerror}",
                "stop the server that has the port, or use another one: --port, --host",
            ) from None


def start(config: Config, made: Application) -> None:
    """Start the HTTP proxy and the application in a running Ray, and wait until it answers.

    Raises:
        PragError: when no replica starts, with its error.
    """
    serve.start(
        http_options=http_options(config),
        logging_config={"enable_access_log": False, "log_level": os.environ.get("PRAG_LOG", "WARNING")},
    )
    try:
        serve.run(made, name=APPLICATION)
    except RuntimeError as error:
        raise PragError(f"the server does not start: {error}", "fix the replica's error, and start again") from None


def http_options(config: Config) -> dict[str, Any]:
    """Return the address of Ray Serve's proxies, and the seconds after which they give up a request."""
    limits = config.serve
    return {"host": limits.host, "port": limits.port, "request_timeout_s": longest_s(limits) + GRACE_S}


def stop() -> None:
    """Remove the application, and wait until its replicas have answered their requests.

    Shutting down Ray Serve would first end its proxies, and with them every connection.
    """
    while True:
        try:
            serve.delete(APPLICATION)
            return
        except TimeoutError:
            # It waits a minute at most. Ray Serve ends replicas that take longer than their grace.
            logger.warning("requests are still under way; a second signal ends them")


def url_of(config: Config) -> str:
    """Return the URL under which this machine reaches the server."""
    host = config.serve.host
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{config.serve.port}"
