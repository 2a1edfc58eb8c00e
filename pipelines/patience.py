"""Bounded patience: a passage that kills, hangs or starves its worker is found, and given up with its reason.

A stage's actor works in a child process (`pipelines.child`). When that is lost, the batch is split until the culprit
is alone, and tried `run.passage_attempts` times in all; its neighbours are done meanwhile. The attempts are counted
by the parent, which outlives the child and knows how it died: no marker has to be written anywhere, and a lost node,
which takes the parent too, is charged to no passage; Ray moves its batch elsewhere.
"""

from __future__ import annotations

import logging
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from cluster.resources import Actors
from pipelines.child import Child, ChildLostError, Limits
from pipelines.outcomes import TASK, Outcome, outcome_table
from prag_core.config import RunConfig
from prag_core.errors import PragError
from prag_core.identity import fingerprint
from prag_core.records import Reject
from prag_core.store import Store, put_rejects

log = logging.getLogger(__name__)

# A batch that lost its worker is split into so many parts at most: with two, a culprit among 64 would cost seven
# workers until it is alone, and each loads the model anew.
_PARTS = 8
_START_ATTEMPTS = 3


@dataclass(frozen=True)
class Desk:
    """Where a stage's rejects go: into the store, as of a run, a stage and the fingerprint of what it follows."""

    store: Store
    run: str
    stage: str
    recipe: str


class Patient:
    """What Ray runs as a stage's actor: it has a child do the work, and another child when that one is lost.

    Args:
        work: The pickled class of the actor that the child holds, with its arguments. They stay pickled here, so that
            this process need not import what they mean.
        preload: The modules that a child needs, for the process from which children are forked.
        desk: Where rejects go.
        limits: `passage_attempts` and `worker_memory_gb` count here.
        silence_s: How long the child may work on a batch before it gives the next outcomes.
        share: Finds out what memory a child may hold where the limits do not say.
    """

    def __init__(
        self,
        work: bytes,
        preload: Sequence[str],
        desk: Desk,
        limits: RunConfig,
        silence_s: float,
        share: Callable[[], float],
    ) -> None:
        self._work = work
        self._preload = preload
        self._desk = desk
        self._attempts = limits.passage_attempts
        memory_bytes = share() if limits.worker_memory_gb is None else limits.worker_memory_gb * 1e9
        self._limits = Limits(silence_s, memory_bytes)
        self._child: Child | None = Child(work, preload)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the outcomes of a batch, those of its rejects among them.

        Raises:
            PragError: what the actor raised on purpose, or when it cannot even be started.
        """
        # Ray tries a batch again as it was; here it may be tried again in parts. Both find what was done of it, and a
        # later run does not: what is missing then, though it was done, was taken out of the store on purpose.
        task = pa.scalar(fingerprint([self._desk.run, *sorted(table["key"].to_pylist())]))
        table = table.append_column(TASK, pa.repeat(task, table.num_rows))
        todo: deque[tuple[pa.Table, int]] = deque([(table, 0)])
        outcomes: list[pa.Table] = []
        rejects: list[Reject] = []
        while todo:
            batch, attempts = todo.popleft()
            try:
                for done in self._try(batch):
                    outcomes.append(done)
                    batch = _without(batch, done)
            except ChildLostError as error:
                attempts += 1
                log.warning("%s: attempt %d, %d passages left: %s", self._desk.stage, attempts, batch.num_rows, error)
                if batch.num_rows > 1:
                    todo.extendleft((part, attempts) for part in reversed(_split(batch)))
                elif batch.num_rows and attempts < self._attempts:
                    todo.appendleft((batch, attempts))
                elif batch.num_rows:
                    rejects.append(self._give_up(batch, attempts, error))
        put_rejects(self._desk.store, self._desk.run, rejects)
        outcomes.append(outcome_table(Outcome(reject.key, rejected=reject.reason) for reject in rejects))
        return pa.concat_tables(outcomes)

    def _try(self, batch: pa.Table) -> Iterator[pa.Table]:
        for attempt in range(_START_ATTEMPTS):
            child = self._child or Child(self._work, self._preload)
            # Until the batch is done: whatever is raised, that child is of no use any more.
            self._child = None
            try:
                yield from child.call(batch, self._limits)
                self._child = child
                return
            except ChildLostError as error:
                if not error.starting:
                    raise
                if attempt == _START_ATTEMPTS - 1:
                    raise PragError(
                        f"{self._desk.stage}: its worker dies as it starts: {error}",
                        "look at the worker's log; give it more memory, or a smaller model",
                    ) from None

    def _give_up(self, batch: pa.Table, attempts: int, lost: ChildLostError) -> Reject:
        (row,) = batch.select(["key", "sources"]).to_pylist()
        desk = self._desk
        return Reject(desk.stage, lost.reason, lost.detail, row["sources"][0], row["key"], attempts, desk.recipe)


def run_actors(
    actor: type,
    arguments: tuple[Any, ...],
    missing: ray.data.Dataset,
    batch: int,
    actors: Actors,
    desk: Desk,
    limits: RunConfig,
    *,
    silence_s: float,
    preload: Sequence[str] = (),
) -> ray.data.Dataset:
    """Return the outcomes of `missing`, to be made by a pool of `actor(*arguments)`.

    One block is one batch of `batch` passages: what a block gives is seen when the block is done. Each actor works in
    a process that it may lose, and that may be silent for `silence_s` over a batch. `preload` names the modules that
    the actor's own imports when it is made.
    """
    work = pickle.dumps((actor, arguments))
    patient = (work, (actor.__module__, *preload), desk, limits, silence_s, actors.memory_bytes)
    # Ray shows a stage's workers by the name of their class.
    named = type(actor.__name__, (Patient,), {})
    return missing.repartition(target_num_rows_per_block=batch, strict=True).map_batches(
        named, batch_size=batch, batch_format="pyarrow", fn_constructor_args=patient, **actors.pool()
    )


def _without(batch: pa.Table, done: pa.Table) -> pa.Table:
    return batch.filter(pc.invert(pc.is_in(batch["key"], value_set=done["key"].combine_chunks())))


def _split(batch: pa.Table) -> list[pa.Table]:
    rows = -(-batch.num_rows // _PARTS)
    return [batch.slice(begin, rows) for begin in range(0, batch.num_rows, rows)]
