"""Bounded patience: a passage that kills, hangs or starves its worker is found, and given up with its reason.

A stage's actor works in a child process (`pipelines.execution.child_process`). When that is lost, the batch is split until the culprit
is alone, and tried `run.passage_attempts` times in all; its neighbours are done meanwhile. The attempts are counted
by the parent, which outlives the child and knows how it died, and kept in the store (`pipelines.execution.attempts`), where
whoever is started after a killed driver finds them. A lost node, which takes the parent too, is charged to no
passage; Ray moves its batch elsewhere.
"""

from __future__ import annotations

import contextlib
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
from pipelines.execution.attempts import AttemptLog
from pipelines.execution.child_process import Child, ChildLostError, Limits
from pipelines.execution.outcomes import TASK, Outcome, outcome_table
from prag_core.config import RunConfig
from prag_core.errors import PragError
from prag_core.identity import fingerprint
from prag_core.records import Reject
from prag_core.store.objects import Store
from prag_core.store.tables import put_rejects

log = logging.getLogger(__name__)

# A batch that lost its worker is split into so many parts at most: with two, a culprit among 64 would cost seven
# workers until it is alone, and each loads the model anew.
_PARTS = 8
_START_ATTEMPTS = 3


@dataclass(frozen=True)
class StageRun:
    """Where a stage's rejects go: into the store, as of a run, a stage and the fingerprint of what it follows."""

    store: Store
    run: str
    stage: str
    recipe: str


class IsolatedWorker:
    """What Ray runs as a stage's actor: it has a child do the work, and another child when that one is lost.

    Args:
        work: The pickled class of the actor that the child holds, with its arguments. They stay pickled here, so that
            this process need not import what they mean.
        preload: The modules that a child needs, for the process from which children are forked.
        desk: Where rejects go.
        limits: `passage_attempts` and `worker_memory_gb` count here.
        silence_s: How long the child may give no sign of life while it works.
        share: Finds out what memory a child may hold where the limits do not say.
    """

    def __init__(
        self,
        work: bytes,
        preload: Sequence[str],
        desk: StageRun,
        limits: RunConfig,
        silence_s: float,
        share: Callable[[], float],
    ) -> None:
        self._work = work
        self._preload = preload
        self._desk = desk
        self._most_attempts = limits.passage_attempts
        self._book = AttemptLog(desk.store, desk.run, desk.stage, desk.recipe)
        memory_bytes = share() if limits.worker_memory_gb is None else limits.worker_memory_gb * 1e9
        self._limits = Limits(silence_s, memory_bytes)
        self._child: Child | None = None
        with contextlib.suppress(ChildLostError):  # the first batch tries again
            self._child = Child(work, preload)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the outcomes of a batch, those of its rejects among them.

        Raises:
            PragError: what the actor raised on purpose, or when it cannot even be started.
        """
        # Ray tries a batch again as it was; here it may be tried again in parts. Both find what was done of it, and a
        # later run does not: what is missing then, though it was done, was taken out of the store on purpose.
        task = pa.scalar(fingerprint([self._desk.run, *sorted(table["key"].to_pylist())]))
        table = table.append_column(TASK, pa.repeat(task, table.num_rows))
        outcomes: list[pa.Table] = []
        todo: deque[pa.Table] = deque()
        earlier = self._book.read(table["key"].to_pylist())
        # What lost a worker in another attempt, perhaps of a driver that was killed, is tried alone, after the others.
        for batch in [_without(table, list(earlier)), *(_only(table, key) for key in earlier)]:
            if batch.num_rows:
                todo.append(batch)
        counts = {key: attempts.count for key, attempts in earlier.items()}
        given_up = {key: attempts.reason for key, attempts in earlier.items() if attempts.reason}
        while todo:
            batch = todo.popleft()
            key = batch["key"][0].as_py()
            if key in given_up:
                outcomes.append(outcome_table([Outcome(key, rejected=given_up[key])]))
                continue
            try:
                for done in self._try(batch):
                    outcomes.append(done)
                    batch = _without(batch, done["key"].to_pylist())
            except ChildLostError as error:
                left = {key: counts.get(key, 0) + 1 for key in batch["key"].to_pylist()}
                counts |= left
                log.warning("%s: a worker lost, %d passages left of its batch: %s", self._desk.stage, len(left), error)
                key = next(iter(left), "")
                if len(left) == 1 and left[key] >= self._most_attempts:
                    outcomes.append(self._give_up(batch, left[key], error))
                    given_up[key] = error.reason
                elif left:
                    self._book.lost(left)
                    todo.extendleft(reversed(_split(batch)))
        self._book.done(counts.keys() - given_up.keys())
        return pa.concat_tables(outcomes)

    def _try(self, batch: pa.Table) -> Iterator[pa.Table]:
        for attempt in range(_START_ATTEMPTS):
            try:
                child = self._child or Child(self._work, self._preload)
                # Until the batch is done: whatever is raised, that child is of no use any more.
                self._child = None
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

    def _give_up(self, batch: pa.Table, attempts: int, lost: ChildLostError) -> pa.Table:
        """Store the reject at once, so that nobody tries the passage again; return its outcome."""
        (row,) = batch.select(["key", "sources"]).to_pylist()
        key, desk = row["key"], self._desk
        reject = Reject(desk.stage, lost.reason, lost.detail, row["sources"][0], key, attempts, desk.recipe)
        put_rejects(desk.store, desk.run, [reject])
        self._book.given_up(key, attempts, lost.reason)
        return outcome_table([Outcome(key, rejected=lost.reason)])


def run_actors(
    actor: type,
    arguments: tuple[Any, ...],
    missing: ray.data.Dataset,
    batch: int,
    actors: Actors,
    desk: StageRun,
    limits: RunConfig,
    *,
    silence_s: float,
    preload: Sequence[str] = (),
) -> ray.data.Dataset:
    """Return the outcomes of `missing`, to be made by a pool of `actor(*arguments)`.

    One block is one batch of `batch` passages: what a block gives is seen when the block is done. Each actor works in
    a process that it may lose, and that may give no sign of life for `silence_s`. `preload` names the modules that
    the actor's own imports when it is made.
    """
    work = pickle.dumps((actor, arguments))
    patient = (work, (actor.__module__, *preload), desk, limits, silence_s, actors.memory_bytes)
    # Ray shows a stage's workers by the name of their class.
    named = type(actor.__name__, (IsolatedWorker,), {})
    return missing.repartition(target_num_rows_per_block=batch, strict=True).map_batches(
        named, batch_size=batch, batch_format="pyarrow", fn_constructor_args=patient, **actors.pool()
    )


def _without(batch: pa.Table, keys: list[str]) -> pa.Table:
    return batch.filter(pc.invert(pc.is_in(batch["key"], value_set=pa.array(keys, pa.string()))))


def _only(batch: pa.Table, key: str) -> pa.Table:
    return batch.filter(pc.equal(batch["key"], key))


def _split(batch: pa.Table) -> list[pa.Table]:
    rows = -(-batch.num_rows // _PARTS)
    return [batch.slice(begin, rows) for begin in range(0, batch.num_rows, rows)]
