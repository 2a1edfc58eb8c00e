"""Profiles: the resources that a job gets on a machine or a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

MB = 1024 * 1024


def list_nodes() -> list[dict[str, Any]]:
    """Return the nodes of the Ray cluster that this process is connected to, as Ray describes them."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


@dataclass(frozen=True)
class Actors:
    """A pool of actors that hold a model: from `min_size` to `max_size` actors, and the resources of each.

    Ray Data starts `min_size` actors, and adds more while batches wait and the cluster has room. `threads` is the
    number of threads with which an actor computes; None means all cores of its node.
    """

    cpus: float
    gpus: float
    min_size: int
    max_size: int
    threads: int | None

    def tuned(
        self,
        *,
        min_size: int | None = None,
        max_size: int | None = None,
        cpus: float | None = None,
        gpus: float | None = None,
        cores: int = 1,
    ) -> Actors:
        """Return this pool with the given numbers in place of its own.

        Several actors that would each compute on all cores of the machine share its `cores`.
        """
        most = self.max_size if max_size is None else max_size
        # An actor computes with as many threads as it takes CPUs, unless the profile gives it all cores.
        threads = self.threads if cpus is None else max(1, int(cpus))
        if self.threads is None:
            threads = None if most == 1 else max(1, cores // most)
        return Actors(
            cpus=self.cpus if cpus is None else cpus,
            gpus=self.gpus if gpus is None else gpus,
            min_size=min(self.min_size if min_size is None else min_size, most),
            max_size=most,
            threads=threads,
        )

    def memory_bytes(self) -> float:
        """Return an actor's share of the memory of the node on which this is called, as Ray counts it."""
        import ray

        here = ray.get_runtime_context().get_node_id()
        (node,) = (node["Resources"] for node in list_nodes() if node["NodeID"] == here)
        return float(node["memory"] / max(1, min(self.max_size, self._room_on(node))))

    def that_fit(self) -> int:
        """Return how many of these actors the nodes of the connected cluster have room for, or how many start at least.

        It counts the nodes that are there, whatever else runs on them.
        """
        nodes = [node["Resources"] for node in list_nodes() if node["Alive"]]
        return min(self.max_size, max(self.min_size, sum(int(self._room_on(node)) for node in nodes)))

    def _room_on(self, resources: Mapping[str, float]) -> float:
        """Return how many of these actors a node with these resources has room for."""
        room = [resources.get("CPU", 0) // self.cpus, *([resources.get("GPU", 0) // self.gpus] if self.gpus else [])]
        return min(room)

    def pool(self, lanes: int = 1) -> dict[str, Any]:
        """Return the arguments of `Dataset.map_batches` for a pool of these actors, each called by `lanes` threads."""
        import ray.data

        # A batch ahead for each thread, so that no actor waits for its next one; more would be lost with the actor.
        # Ray Data adds actors only if the batches of an actor are about twice its threads.
        compute = ray.data.ActorPoolStrategy(
            min_size=self.min_size,
            max_size=self.max_size,
            max_tasks_in_flight_per_actor=2 * lanes,
            max_concurrent_calls_per_actor=lanes,
            enable_true_multi_threading=lanes > 1,
        )
        resources: dict[str, Any] = {"compute": compute, "num_cpus": self.cpus}
        if self.gpus:
            resources["num_gpus"] = self.gpus
        return resources


@dataclass(frozen=True)
class Profile:
    """The resources of a job.

    `logical_cpus` and `object_store_bytes` are for a Ray that the job starts itself; with None Ray finds them out.
    `partitions` is the number of blocks of a shuffle of more than `rows_per_task` passages. `augment` and `train` are
    the actor pools of these stages, and `answer` is what a process that answers questions gets: a serving replica, the
    canaries, an evaluation. `index_cpus` are the CPUs of the process that builds the index. `tokens_per_step` is the
    number of tokens that a training actor processes at once.
    """

    name: str
    logical_cpus: int | None
    object_store_bytes: int | None
    partitions: int
    augment: Actors
    train: Actors
    answer: Actors
    index_cpus: float
    tokens_per_step: int
    # The passages that one task can hold with their texts: some tens of megabytes.
    rows_per_task: int = 20_000

    def blocks(self, passages: int) -> int:
        """Return the number of blocks into which `passages` rows are shuffled.

        A shuffle into several blocks needs actors, each a process that takes seconds to start; one block is a task.
        """
        return 1 if passages <= self.rows_per_task else self.partitions

    def tuned(self, *, partitions: int | None = None, tokens_per_step: int | None = None) -> Profile:
        """Return this profile with the given numbers in place of its own."""
        return replace(
            self,
            partitions=self.partitions if partitions is None else partitions,
            rows_per_task=self.rows_per_task if partitions is None else 0,
            tokens_per_step=self.tokens_per_step if tokens_per_step is None else tokens_per_step,
        )


_LAPTOP = Actors(cpus=1, gpus=0, min_size=1, max_size=1, threads=None)
_GPU = Actors(cpus=2, gpus=1, min_size=1, max_size=8, threads=2)
_CLUSTER = Actors(cpus=4, gpus=1, min_size=1, max_size=1000, threads=4)

PROFILES: dict[str, Profile] = {
    # About two cores. One logical CPU is for tasks that read, one for the actor that computes; worker processes take
    # seconds to start, so there are few. A thousand tokens keep two cores busy, and small steps have less padding.
    "laptop": Profile(
        name="laptop",
        logical_cpus=2,
        object_store_bytes=400 * MB,
        partitions=2,
        augment=_LAPTOP,
        train=_LAPTOP,
        answer=_LAPTOP,
        index_cpus=1,
        tokens_per_step=1024,
    ),
    # One machine with one or more GPUs.
    "gpu": Profile(
        name="gpu",
        logical_cpus=None,
        object_store_bytes=None,
        partitions=16,
        augment=_GPU,
        train=_GPU,
        answer=_GPU,
        index_cpus=2,
        tokens_per_step=32_768,
    ),
    # A cluster that may grow.
    "cluster": Profile(
        name="cluster",
        logical_cpus=None,
        object_store_bytes=None,
        partitions=256,
        augment=_CLUSTER,
        train=_CLUSTER,
        answer=_CLUSTER,
        index_cpus=4,
        tokens_per_step=32_768,
    ),
}
