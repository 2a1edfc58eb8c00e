"""Profiles: what a machine or a cluster gives to a job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MB = 1024 * 1024


@dataclass(frozen=True)
class Actors:
    """A pool of model-holding actors: how many, and what each may use."""

    cpus: float
    gpus: float
    most: int
    threads: int | None

    def memory_bytes(self) -> float:
        """Return the share of an actor in what Ray counts as the memory of the node on which this is called."""
        import ray

        here = ray.get_runtime_context().get_node_id()
        (node,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
        room = [node.get("CPU", 0) // self.cpus, *([node.get("GPU", 0) // self.gpus] if self.gpus else [])]
        return float(node["memory"]) / max(1, min(self.most, *room))


@dataclass(frozen=True)
class Profile:
    """What a job may use.

    `logical_cpus` and `object_store_bytes` are for a Ray that the job starts itself and None where Ray finds out;
    `partitions` is the number of parts of a shuffle; `model_actors` is the pool of a stage that holds a model;
    `tokens_per_step` is what such an actor takes at once.
    """

    name: str
    logical_cpus: int | None
    object_store_bytes: int | None
    partitions: int
    model_actors: Actors
    tokens_per_step: int

    def pool(self) -> dict[str, Any]:
        """Return the arguments of `Dataset.map_batches` for a pool of model actors."""
        import ray.data

        actors = self.model_actors
        resources: dict[str, Any] = {
            "compute": ray.data.ActorPoolStrategy(min_size=1, max_size=actors.most, max_tasks_in_flight_per_actor=2),
            "num_cpus": actors.cpus,
        }
        if actors.gpus:
            resources["num_gpus"] = actors.gpus
        return resources


PROFILES: dict[str, Profile] = {
    # Two cores or so. One logical CPU more than readers need, for the one actor that computes; each worker process
    # costs seconds to start, so there are few. A thousand tokens keep two cores as busy as more would, and in small
    # steps less is padding.
    "laptop": Profile("laptop", 2, 400 * MB, 2, Actors(cpus=1, gpus=0, most=1, threads=None), 1024),
    "gpu": Profile("gpu", None, None, 16, Actors(cpus=2, gpus=1, most=8, threads=2), 32_768),
    "cluster": Profile("cluster", None, None, 256, Actors(cpus=4, gpus=1, most=1000, threads=4), 32_768),
}
