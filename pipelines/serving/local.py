"""Starting and stopping the Ray Serve application on this machine."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve import Application

from cluster.preflight import on_cluster
from cluster.session import ray_session
from pipelines.serving.deployment import APPLICATION, GRACE_S, application, logger
from pipelines.serving.dispatcher import longest_s
from pipelines.settings import profile_of
from prag_core.config import Config
from prag_core.errors import ConfigError, PragError
from prag_core.store.objects import open_store
from prag_core.store.snapshot import load_snapshot


def serve_here(config: Config, ready: Callable[[str], None]) -> None:
    """Serve on this machine, or on the cluster that RAY_ADDRESS names, until interrupted or terminated.

    What is under way then is still answered, unless a second signal comes. On a cluster only the application goes:
    Ray Serve and what else it runs are others'.

    Args:
        config: The configuration.
        ready: Called with the server's URL when it answers.

    Raises:
        ConfigError: when somebody listens on `serve.port` already; and see `application`.
        StoreError: when nothing is published yet.
        PragError: when no replica comes up, with what it said.
    """
    limits = config.serve
    made = application(config)
    alone = not on_cluster()
    if alone:
        check_port(limits.host, limits.port)
    load_snapshot(open_store(config))
    profile = profile_of(config)
    if profile.logical_cpus is not None:
        cpus = math.ceil(limits.max_replicas * profile.model_actors.cpus)
        profile = replace(profile, logical_cpus=max(profile.logical_cpus, cpus))
    end = threading.Event()
    with ray_session(profile):
        with _on_signals(end):
            start(config, made)
            ready(url_of(config))
            end.wait()
        stop()
        if alone:
            serve.shutdown()


def check_port(host: str, port: int) -> None:
    """Check that nobody listens where the server will: two servers would share the port, and its questions, in silence.

    Raises:
        ConfigError: when somebody does, or this machine cannot listen there.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # Connections that have just ended are no reason; Ray Serve's SO_REUSEPORT would let a second listener in.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            raise ConfigError(
                f"serve.port = {port}: cannot listen on {host}: {error.strerror}",
                "end the server that has the port, or take another one: --port, --host",
            ) from None


def start(config: Config, made: Application) -> None:
    """Start the HTTP proxy and the application in a running Ray, and wait until it answers.

    Raises:
        PragError: when no replica comes up, with what it said.
    """
    serve.start(
        http_options=http_options(config),
        logging_config={"enable_access_log": False, "log_level": os.environ.get("PRAG_LOG", "WARNING")},
    )
    try:
        serve.run(made, name=APPLICATION)
    except RuntimeError as error:
        raise PragError(f"the server does not start: {error}", "mend what the replica says, and start again") from None


def http_options(config: Config) -> dict[str, Any]:
    """Return where Ray Serve's proxies listen, and after how many seconds they give a request up: a backstop."""
    limits = config.serve
    return {"host": limits.host, "port": limits.port, "request_timeout_s": longest_s(limits) + GRACE_S}


def stop() -> None:
    """Take the application out of service, and wait until its replicas have answered what they had.

    Shutting Ray Serve down instead would first end its proxies, and with them every connection.
    """
    while True:
        try:
            serve.delete(APPLICATION)
            return
        except TimeoutError:
            # It waits for a minute. Ray Serve ends replicas that take longer than they are given.
            logger.warning("requests are still under way; a second signal ends them")


def url_of(config: Config) -> str:
    """Return the URL under which this machine reaches the server."""
    host = config.serve.host
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{config.serve.port}"


@contextlib.contextmanager
def _on_signals(end: threading.Event) -> Iterator[None]:
    before = {number: signal.signal(number, lambda *_: end.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
