"""The Ray Serve application: each replica holds one `Service` and the HTTP API before it.

`prag serve` runs it on this machine; `serve deploy examples/serve.yaml` on a cluster, by `build`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from cluster.preflight import on_cluster
from cluster.session import ray_session
from pipelines.follow import Follower
from pipelines.http_api import make_app
from pipelines.http_desk import Desk, longest_s
from pipelines.http_metrics import Metrics, merged
from pipelines.http_safety import RateLimiter, open_keys
from pipelines.profiles import profile_of
from pipelines.tables import set_threads
from prag_core.config import Config, check_defaults, load_config, parse_config
from prag_core.errors import ConfigError, PragError
from prag_core.retrieval import JVM_ENV
from prag_core.service import Service, open_service
from prag_core.snapshot import load_snapshot
from prag_core.store import open_store

logger = logging.getLogger(__name__)

APPLICATION = "prag"
DEPLOYMENT = "AnswerQuestions"
# Places besides the service's own, for health checks, metrics and answers "too much to do".
SPARE_REQUESTS = 64
SCRAPE_TIMEOUT_S = 5.0
# What Ray Serve gives an HTTP request beyond the longest that the service keeps to by itself.
GRACE_S = 10.0


class Arguments(BaseModel):
    """What a Serve config file gives under `args`: the configuration's path, and settings that override it."""

    model_config = ConfigDict(extra="forbid")

    config: str
    set: list[str] = Field([], description="As `--set` on the command line: `serve.max_replicas=4`.")


def build(args: dict[str, Any]) -> Application:
    """Return the application for a Serve config file (`import_path: pipelines.serve:build`); see `Arguments`.

    Raises:
        ConfigError: when the configuration is wrong; see `application`.
        ValidationError: when `args` are others.
    """
    arguments = Arguments.model_validate(args)
    return application(load_config(arguments.config, arguments.set))


def application(config: Config) -> Application:
    """Return the application for a configuration.

    Raises:
        ConfigError: when `serve.host` is public and there are no keys, or a default is beyond a limit.
    """
    limits = config.serve
    open_keys(limits, limits.host)
    check_defaults(config)
    actors = profile_of(config).model_actors
    most = limits.slots + limits.max_queue + SPARE_REQUESTS
    options: dict[str, Any] = {
        "max_ongoing_requests": most,
        # The service itself turns away what is too much; this bounds what waits for a replica that starts.
        "max_queued_requests": most,
        "backpressure_config": {"status_code": 503, "retry_after_s": 1},
        "ray_actor_options": {
            "num_cpus": actors.cpus,
            "num_gpus": actors.gpus,
            "runtime_env": {"env_vars": JVM_ENV},
        },
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": longest_s(limits) + GRACE_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_constructor_retry_count": 3,
    }
    if limits.min_replicas < limits.max_replicas:
        options["autoscaling_config"] = {
            "min_replicas": limits.min_replicas,
            "max_replicas": limits.max_replicas,
            "target_ongoing_requests": limits.target_ongoing_requests,
            "upscale_delay_s": limits.upscale_delay_s,
            "downscale_delay_s": limits.downscale_delay_s,
            "metrics_interval_s": min(1.0, limits.upscale_delay_s),
            "look_back_period_s": max(2.0, limits.upscale_delay_s),
        }
    else:
        options["num_replicas"] = limits.min_replicas
    deployment = serve.deployment(serve.ingress()(AnswerQuestions), name=DEPLOYMENT).options(**options)
    return deployment.bind(config.model_dump(mode="json"), actors.threads)


class AnswerQuestions:
    """One replica: it opens the service, follows the store's `CURRENT`, and says whether it is well.

    Args:
        settings: The configuration, as plain values.
        threads: The threads of its arithmetic; None leaves them as they are.
    """

    async def __init__(self, settings: dict[str, Any], threads: int | None) -> None:
        set_threads(threads)
        self._config = parse_config(settings)
        self._keys = open_keys(self._config.serve, self._config.serve.host)
        self._service: Service = await asyncio.to_thread(open_service, self._config, open_store(self._config))
        self._metrics = Metrics(self._service.stats)
        self._limiter = RateLimiter()
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        self._application = context.app_name
        self._everyone: DeploymentHandle | None = None
        self._following = Follower(self._follow, self._config.serve.refresh_s, self._metrics.refresh_failed)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP API; Serve asks for it once the replica is made."""
        desk = Desk(self._service, self._config, self._metrics, self._limiter)
        return make_app(desk, self._keys, self._scrape)

    def check_health(self) -> None:
        """Raise when this replica must be replaced; Serve asks every few seconds."""
        self._service.check()
        self._following.check()

    def numbers(self) -> tuple[str, str]:
        """Return this replica's name and its numbers in Prometheus's text format."""
        return self._name, self._metrics.text()

    async def __del__(self) -> None:
        # Serve waits for the requests under way before it calls this.
        if hasattr(self, "_following"):
            self._following.end()
            await self._service.drain()
            self._service.close()

    async def _scrape(self) -> str:
        return merged(dict(await self._ask_all()))

    async def _ask_all(self) -> list[tuple[str, str]]:
        """Return what `numbers` gives in every replica; one that is starting or has just died is left out."""
        if self._everyone is None:
            self._everyone = serve.get_deployment_handle(DEPLOYMENT, self._application)
        try:
            answer = self._everyone.broadcast("numbers")
            told = await answer.results_async(timeout_s=SCRAPE_TIMEOUT_S, return_exceptions=True)
        except Exception as error:  # whatever it is, it must keep neither metrics nor new snapshots away
            logger.warning("the other replicas cannot be asked: %s", error)
            told = []
        return [one for one in told if isinstance(one, tuple)] or [self.numbers()]

    async def _follow(self) -> None:
        """Share a key's rate with the other replicas, and put what was published into service."""
        self._limiter.share = len(await self._ask_all())
        if await self._service.refresh():
            logger.info("snapshot %s is in service", self._service.snapshot)


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
