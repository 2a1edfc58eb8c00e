"""Profiles: what a machine or a cluster gives to a job."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

MB = 1024 * 1024


@dataclass(frozen=True)
class Actors:
    """A pool of model-holding actors: from `least` to `most` of them, and what each may use.

    Ray Data begins with `least` and adds actors while batches wait for one and the cluster has room; `threads` is
    how many each computes with (None: all cores of its node).
    """

    cpus: float
    gpus: float
    least: int
    most: int
    threads: int | None

    def memory_bytes(self) -> float:
        """Return the share of an actor in what Ray counts as the memory of the node on which this is called."""
        import ray

        here = ray.get_runtime_context().get_node_id()
        (node,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
        room = [node.get("CPU", 0) // self.cpus, *([node.get("GPU", 0) // self.gpus] if self.gpus else [])]
        return float(node["memory"]) / max(1, min(self.most, *room))

    def pool(self) -> dict[str, Any]:
        """Return the arguments of `Dataset.map_batches` for a pool of these actors."""
        import ray.data

        # One batch ahead, so that no actor waits for its next; more would be lost with it.
        compute = ray.data.ActorPoolStrategy(min_size=self.least, max_size=self.most, max_tasks_in_flight_per_actor=2)
        resources: dict[str, Any] = {"compute": compute, "num_cpus": self.cpus}
        if self.gpus:
            resources["num_gpus"] = self.gpus
        return resources


@dataclass(frozen=True)
class Profile:
    """What a job may use.

    `logical_cpus` and `object_store_bytes` are for a Ray that the job starts itself and None where Ray finds out;
    `partitions` is the number of blocks that a shuffle makes of more than `rows_per_task` passages; `augment` and
    `train` are the pools of the two stages that hold a model, and `index_cpus` is what the one process of the index
    takes; `tokens_per_step` is what a training actor takes at once.
    """

    name: str
    logical_cpus: int | None
    object_store_bytes: int | None
    partitions: int
    augment: Actors
    train: Actors
    index_cpus: float
    tokens_per_step: int
    # What one task holds with all texts: some tens of megabytes.
    rows_per_task: int = 20_000

    def blocks(self, passages: int) -> int:
        """Return into how many blocks so many passages, or what is known of each, are shuffled.

        A shuffle into several takes actors, each a process that takes seconds to start; into one it takes a task.
        """
        return 1 if passages <= self.rows_per_task else self.partitions

    @property
    def model_actors(self) -> Actors:
        """What a process that holds a model takes, outside of the stages: a replica that answers."""
        return self.train

    def tuned(
        self,
        *,
        actors_min: int | None = None,
        actors_max: int | None = None,
        actor_cpus: float | None = None,
        actor_gpus: float | None = None,
        partitions: int | None = None,
        tokens_per_step: int | None = None,
    ) -> Profile:
        """Return this profile with what is given in place of its own."""

        def actors(pool: Actors) -> Actors:
            most = pool.most if actors_max is None else actors_max
            least = min(pool.least if actors_min is None else actors_min, most)
            cpus = pool.cpus if actor_cpus is None else actor_cpus
            gpus = pool.gpus if actor_gpus is None else actor_gpus
            # An actor computes on the cores that it takes, where the profile counts them at all.
            threads = pool.threads if actor_cpus is None else max(1, int(actor_cpus))
            if pool.threads is None:
                threads = None if most == 1 else share_of_cores(most)
            return Actors(cpus, gpus, least, most, threads)

        return replace(
            self,
            augment=actors(self.augment),
            train=actors(self.train),
            index_cpus=self.index_cpus if actor_cpus is None else min(self.index_cpus, actor_cpus),
            partitions=self.partitions if partitions is None else partitions,
            rows_per_task=self.rows_per_task if partitions is None else 0,
            tokens_per_step=self.tokens_per_step if tokens_per_step is None else tokens_per_step,
        )


def share_of_cores(processes: int) -> int:
    """Return on how many cores of this machine each of some processes computes, so that none waits for another's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


def _same(actors: Actors) -> dict[str, Actors]:
    return {"augment": actors, "train": actors}


PROFILES: dict[str, Profile] = {
    # Two cores or so. One logical CPU more than readers need, for the one actor that computes; each worker process
    # costs seconds to start, so there are few. A thousand tokens keep two cores as busy as more would, and in small
    # steps less is padding.
    "laptop": Profile(
        name="laptop",
        logical_cpus=2,
        object_store_bytes=400 * MB,
        partitions=2,
        **_same(Actors(cpus=1, gpus=0, least=1, most=1, threads=None)),
        index_cpus=1,
        tokens_per_step=1024,
    ),
    # One machine with one GPU or some.
    "gpu": Profile(
        name="gpu",
        logical_cpus=None,
        object_store_bytes=None,
        partitions=16,
        **_same(Actors(cpus=2, gpus=1, least=1, most=8, threads=2)),
        index_cpus=2,
        tokens_per_step=32_768,
    ),
    # Whatever the cluster has, and grows to.
    "cluster": Profile(
        name="cluster",
        logical_cpus=None,
        object_store_bytes=None,
        partitions=256,
        **_same(Actors(cpus=4, gpus=1, least=1, most=1000, threads=4)),
        index_cpus=4,
        tokens_per_step=32_768,
    ),
}
