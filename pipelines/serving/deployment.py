"""The Ray Serve application: each replica holds one `Service` and the HTTP API in front of it.

`prag serve` runs it on this machine. `serve deploy examples/serve.yaml` runs it on a cluster, through `build`.
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

from cluster.resources import Actors
from pipelines.serving.app import make_app
from pipelines.serving.dispatcher import Dispatcher, longest_s
from pipelines.serving.metrics import Metrics, merge_metrics
from pipelines.serving.middleware import RateLimiter, open_keys
from pipelines.serving.periodic_task import PeriodicTask
from pipelines.settings import profile_of
from prag_core.config import Config, check_defaults
from prag_core.config_file import load_config, parse_config
from prag_core.inference.service import Service, open_service
from prag_core.llm.threads import available_cores, compute_elsewhere
from prag_core.retrieval.kinds import index_kind
from prag_core.store.objects import open_store

logger = logging.getLogger(__name__)

APPLICATION = "prag"
DEPLOYMENT = "AnswerQuestions"
# Requests beyond those that the service accepts: health checks, metrics, and those that get "overloaded".
SPARE_REQUESTS = 64
SCRAPE_TIMEOUT_S = 5.0
# Ray Serve ends an HTTP request this long after the service itself should have ended it.
GRACE_S = 10.0


class ServeArguments(BaseModel):
    """The `args` of a Serve config file: the configuration's path, and settings that override it."""

    model_config = ConfigDict(extra="forbid")

    config: str
    set: list[str] = Field([], description="As `--set` on the command line, e.g. `serve.max_replicas=4`.")


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
        ConfigError: when `serve.host` is public and there are no keys, or a default is above a limit.
    """
    open_keys(config.serve)
    check_defaults(config)
    actors = profile_of(config).answer
    cores = actors.threads or max(1, available_cores() // config.serve.max_replicas)
    deployment = serve.deployment(name=DEPLOYMENT, **_options(config, actors))(serve.ingress()(AnswerQuestions))
    return deployment.bind(config.model_dump(mode="json"), cores, actors.gpus)


def _options(config: Config, actors: Actors) -> dict[str, Any]:
    limits = config.serve
    max_requests = limits.slots + limits.max_queue + SPARE_REQUESTS
    options: dict[str, Any] = {
        "max_ongoing_requests": max_requests,
        # The service itself refuses requests in overload; this limits those that wait for a starting replica.
        "max_queued_requests": max_requests,
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
    return options


class AnswerQuestions:
    """One replica: it opens the service, follows the store's `CURRENT`, and reports its health.

    Args:
        settings: The configuration, as plain values.
        cores: The cores that its decoding thread computes on; None stands for all of the machine.
        gpus: The GPUs that it holds.
    """

    async def __init__(self, settings: dict[str, Any], cores: int | None, gpus: float) -> None:  # type: ignore[misc]
        compute_elsewhere()
        self._config = parse_config(settings)
        self._keys = open_keys(self._config.serve)
        store = open_store(self._config)
        self._service: Service = await asyncio.to_thread(open_service, self._config, store, cores, gpus=gpus)
        self._metrics = Metrics(self._service.stats)
        self._limiter = RateLimiter()
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        self._application = context.app_name
        self._replicas: DeploymentHandle[Any] | None = None
        self._refreshing = PeriodicTask(self._refresh, self._config.serve.refresh_s, self._metrics.refresh_failed)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP API; Ray Serve calls this once the replica is made."""
        dispatcher = Dispatcher(self._service, self._config, self._metrics, self._limiter)
        return make_app(dispatcher, self._keys, self._scrape)

    def check_health(self) -> None:
        """Raise when this replica must be replaced; Ray Serve calls this every few seconds."""
        self._service.check()
        self._refreshing.check()

    def metrics(self) -> tuple[str, str]:
        """Return this replica's name and its metrics in Prometheus's text format."""
        return self._name, self._metrics.text()

    async def __del__(self) -> None:
        # Ray Serve waits for the requests under way before it calls this.
        if hasattr(self, "_refreshing"):
            self._refreshing.cancel()
            await self._service.drain()
            self._service.close()

    async def _scrape(self) -> str:
        return merge_metrics(dict(await self._all_metrics()))

    async def _all_metrics(self) -> list[tuple[str, str]]:
        """Return `metrics` of every replica, without those that are starting or have just died."""
        if self._replicas is None:
            self._replicas = serve.get_deployment_handle(DEPLOYMENT, self._application)
        try:
            responses = self._replicas.broadcast("metrics")
            found = await responses.results_async(timeout_s=SCRAPE_TIMEOUT_S, return_exceptions=True)
        except Exception as error:  # no failure here may stop the metrics or new snapshots
            logger.warning("the other replicas cannot be asked for their metrics: %s", error)
            found = []
        return [one for one in found if isinstance(one, tuple)] or [self.metrics()]

    async def _refresh(self) -> None:
        """Count the replicas that share each key's rate, and put a new snapshot into service."""
        self._limiter.replicas = len(await self._all_metrics())
        if await self._service.refresh():
            logger.info("snapshot %s is in service", self._service.snapshot)
