"""The Ray Serve application: each replica holds one `Service` and the HTTP API before it.

`prag serve` runs it on this machine; `serve deploy examples/serve.yaml` on a cluster, by `build`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from cluster.resources import share_of_cores
from pipelines.serving.app import make_app
from pipelines.serving.dispatcher import Dispatcher, longest_s
from pipelines.serving.follower import Follower
from pipelines.serving.metrics import Metrics, merged
from pipelines.serving.middleware import RateLimiter, open_keys
from pipelines.settings import profile_of
from prag_core.config import Config, check_defaults
from prag_core.config_file import load_config, parse_config
from prag_core.inference.service import Service, open_service
from prag_core.llm.threads import compute_elsewhere
from prag_core.retrieval.kinds import index_kind
from prag_core.store.objects import open_store

logger = logging.getLogger(__name__)

APPLICATION = "prag"
DEPLOYMENT = "AnswerQuestions"
# Places besides the service's own, for health checks, metrics and answers "too much to do".
SPARE_REQUESTS = 64
SCRAPE_TIMEOUT_S = 5.0
# What Ray Serve gives an HTTP request beyond the longest that the service keeps to by itself.
GRACE_S = 10.0


class ServeArguments(BaseModel):
    """What a Serve config file gives under `args`: the configuration's path, and settings that override it."""

    model_config = ConfigDict(extra="forbid")

    config: str
    set: list[str] = Field([], description="As `--set` on the command line: `serve.max_replicas=4`.")


def build(args: dict[str, Any]) -> Application:
    """Return the application for a Serve config file, whose `import_path` names this function.

    `args` are those of `ServeArguments`.

    Raises:
        ConfigError: when the configuration is wrong; see `application`.
        ValidationError: when `args` are not those of `ServeArguments`.
    """
    arguments = ServeArguments.model_validate(args)
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
            "runtime_env": {"env_vars": index_kind(config.index).PROCESS_ENV},
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
    cores = share_of_cores(limits.max_replicas) if actors.threads is None else actors.threads
    return deployment.bind(config.model_dump(mode="json"), cores)


class AnswerQuestions:
    """One replica: it opens the service, follows the store's `CURRENT`, and says whether it is well.

    Args:
        settings: The configuration, as plain values.
        cores: The cores that its decoding thread computes on; None stands for all of the machine.
    """

    async def __init__(self, settings: dict[str, Any], cores: int | None) -> None:
        compute_elsewhere()
        self._config = parse_config(settings)
        self._keys = open_keys(self._config.serve, self._config.serve.host)
        self._service: Service = await asyncio.to_thread(open_service, self._config, open_store(self._config), cores)
        self._metrics = Metrics(self._service.stats)
        self._limiter = RateLimiter()
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        self._application = context.app_name
        self._everyone: DeploymentHandle | None = None
        self._following = Follower(self._follow, self._config.serve.refresh_s, self._metrics.refresh_failed)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP API; Serve asks for it once the replica is made."""
        desk = Dispatcher(self._service, self._config, self._metrics, self._limiter)
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
