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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data

from cluster.resources import Actors
from pipelines.child import Child, ChildLostError, Limits
from pipelines.outcomes import Outcome, outcome_table
from prag_core.config import RunConfig
from prag_core.errors import PragError
from prag_core.records import Reject
from prag_core.store import Store, put_rejects

log = logging.getLogger(__name__)

# A batch that lost its worker is split into so many parts at most: with two, a culprit among 64 would cost seven
# workers until it is alone, and each loads the model anew.
_PARTS = 8
_START_ATTEMPTS = 3
# Within this a batch answers or is split, however many passages it has: Ray takes a stage for stuck in the end.
_LONGEST_BATCH_S = 3600.0


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
        preload: The module of that class.
        desk: Where rejects go.
        limits: `passage_attempts`, `passage_timeout_s` and `worker_memory_gb` count here.
        share: Finds out what memory a child may hold where the limits do not say.
    """

    def __init__(self, work: bytes, preload: str, desk: Desk, limits: RunConfig, share: Callable[[], float]) -> None:
        self._work = work
        self._preload = preload
        self._desk = desk
        self._limits = limits
        self._memory_bytes = share() if limits.worker_memory_gb is None else limits.worker_memory_gb * 1e9
        self._child: Child | None = self._start()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the outcomes of a batch, those of its rejects among them.

        Raises:
            PragError: what the actor raised on purpose, or when it cannot even be started.
        """
        todo: deque[tuple[pa.Table, int]] = deque([(table, 0)])
        answers: list[pa.Table] = []
        rejects: list[Reject] = []
        while todo:
            batch, attempts = todo.popleft()
            try:
                answers.append(self._try(batch))
                continue
            except ChildLostError as error:
                lost = error
            attempts += 1
            log.warning(
                "%s: attempt %d at %d passages: %s (%s)",
                self._desk.stage,
                attempts,
                batch.num_rows,
                lost.reason,
                lost.detail,
            )
            if batch.num_rows > 1:
                todo.extendleft((part, attempts) for part in reversed(_split(batch)))
            elif attempts < self._limits.passage_attempts:
                todo.appendleft((batch, attempts))
            else:
                rejects.append(self._give_up(batch, attempts, lost))
        put_rejects(self._desk.store, self._desk.run, rejects)
        answers.append(outcome_table(Outcome(reject.key, rejected=reject.reason) for reject in rejects))
        return pa.concat_tables(answers)

    def _start(self) -> Child:
        return Child(self._work, [self._preload])

    def _try(self, batch: pa.Table) -> pa.Table:
        timeout = self._limits.passage_timeout_s
        seconds = max(timeout, min(timeout * batch.num_rows, _LONGEST_BATCH_S))
        for attempt in range(_START_ATTEMPTS):
            if self._child is None:
                self._child = self._start()
            try:
                return self._child.call(batch, Limits(seconds, self._memory_bytes))
            except ChildLostError as error:
                self._child = None
                if not error.starting:
                    raise
                if attempt == _START_ATTEMPTS - 1:
                    raise PragError(
                        f"{self._desk.stage}: its worker dies as it starts: {error.reason}: {error.detail}",
                        "look at the worker's log; give it more memory, or a smaller model",
                    ) from None
            except PragError:  # the child has ended with it
                self._child = None
                raise
        raise AssertionError("unreachable")

    def _give_up(self, batch: pa.Table, attempts: int, lost: ChildLostError) -> Reject:
        (row,) = batch.select(["key", "sources"]).to_pylist()
        desk = self._desk
        return Reject(desk.stage, lost.reason, lost.detail, row["sources"][0], row["key"], attempts, desk.recipe)


def run_actors(
    actor: type,
    arguments: tuple[Any, ...],
    missing: ray.data.Dataset,
    total: int,
    batch: int,
    actors: Actors,
    desk: Desk,
    limits: RunConfig,
) -> ray.data.Dataset:
    """Return the outcomes of `missing` (`total` passages), to be made by a pool of `actor(*arguments)`.

    One block is one batch: what a block gives is seen when the block is done, and lost if it is not. Each actor works
    in a process that it may lose.
    """
    patient = (pickle.dumps((actor, arguments)), actor.__module__, desk, limits, actors.memory_bytes)
    return missing.repartition(-(-total // batch)).map_batches(
        Patient, batch_size=batch, batch_format="pyarrow", fn_constructor_args=patient, **actors.pool()
    )


def _split(batch: pa.Table) -> list[pa.Table]:
    rows = -(-batch.num_rows // _PARTS)
    return [batch.slice(begin, rows) for begin in range(0, batch.num_rows, rows)]
