"""Isolation: find the passage that kills, hangs or starves its worker, and reject it alone.

A stage's actor works in a child process (`pipelines.execution.child_process`). When the child is lost, its batch is
split until the culprit is alone; a passage gets `run.passage_attempts` attempts in all. The parent counts them: it
outlives the child and knows how it died. A child may hold two batches: one is worked on, the other prepared or
finished. If it is lost then, neither is charged, and each is tried again alone. The counts are in the store
(`pipelines.execution.attempts`), where a run that is started after a killed driver finds them. When a node is lost, and
the parent with it, no passage is charged; Ray moves the batch to another node.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data

from cluster.resources import Actors
from pipelines.execution.attempts import AttemptLog
from pipelines.execution.board import BoardWriter
from pipelines.execution.child_process import Child, ChildLostError, Heartbeat, Limits
from pipelines.execution.outcomes import TASK, Outcome, outcome_table
from pipelines.execution.tables import drop_keys, keep_keys
from prag_core.config import RunConfig
from prag_core.errors import PragError
from prag_core.identity import fingerprint
from prag_core.records import Reject
from prag_core.store.objects import Store
from prag_core.store.tables import put_rejects

log = logging.getLogger(__name__)

# The most parts into which a batch is split after it lost its worker. With two, a culprit among 64 would cost seven
# workers until it is alone, and each of them loads the model again.
_PARTS = 8
_START_ATTEMPTS = 3


@dataclass(frozen=True)
class StageRun:
    """One stage of one run: under which names its rejects are stored, and what its workers may use.

    `recipe` is the fingerprint of the recipe that the stage follows. Of `limits`, `passage_attempts` and
    `worker_memory_gb` count here. `silence_s` is how long a worker may be silent while it works. On `board` workers
    write how far they are (`pipelines.execution.board`).
    """

    store: Store
    run: str
    stage: str
    recipe: str
    limits: RunConfig
    silence_s: float
    board: Any = None


class IsolatedWorker:
    """The actor that Ray runs for a stage: a child process does the work, and is replaced when it is lost.

    Args:
        work: The pickled class of the child's actor, with its arguments. They stay pickled here, so that this process
            need not import their modules.
        preload: The modules that a child needs; the process from which children are forked imports them.
        stage_run: The stage and the run.
        memory_share: Returns the bytes that a child may hold if `limits` do not say.
        lanes: The number of batches that the child holds; so many threads call this.
    """

    def __init__(
        self,
        work: bytes,
        preload: Sequence[str],
        stage_run: StageRun,
        memory_share: Callable[[], float],
        lanes: int = 1,
    ) -> None:
        self._work = work
        self._preload = preload
        self._stage_run = stage_run
        self._max_attempts = stage_run.limits.passage_attempts
        self._attempt_log = AttemptLog(stage_run.store, stage_run.run, stage_run.stage, stage_run.recipe)
        memory_gb = stage_run.limits.worker_memory_gb
        self._limits = Limits(stage_run.silence_s, memory_share() if memory_gb is None else memory_gb * 1e9)
        self._lanes = lanes
        # A batch takes one place while it is in the child, or all of them to be alone; they are taken by one thread at
        # a time, so that two that want all do not wait for each other.
        self._places = threading.Semaphore(lanes)
        self._taking = threading.Lock()
        self._replacing = threading.Lock()
        self._board = BoardWriter(stage_run.board)
        self._child: Child | None = None
        with contextlib.suppress(ChildLostError):  # the first batch tries again
            self._child = Child(work, preload, lanes)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the outcomes of a batch of passages, including those of its rejects.

        Raises:
            PragError: when the actor raised one, or cannot even be started.
        """
        # Ray retries a whole batch; after a loss this class retries parts of it. Both know the batch by this name,
        # and skip what it has committed. A later run has another name: what is missing then was removed on purpose.
        task = pa.scalar(fingerprint([self._stage_run.run, *sorted(table["key"].to_pylist())]))
        table = table.append_column(TASK, pa.repeat(task, table.num_rows))
        outcomes: list[pa.Table] = []
        earlier = self._attempt_log.read(table["key"].to_pylist())
        # A passage that lost a worker in another attempt, perhaps of a killed driver, is tried alone, after the others.
        batches = [drop_keys(table, list(earlier)), *(keep_keys(table, [key]) for key in earlier)]
        pending = deque(batch for batch in batches if batch.num_rows)
        counts = {key: attempts.count for key, attempts in earlier.items()}
        given_up = {key: attempts.reason for key, attempts in earlier.items() if attempts.reason}
        suspected = bool(earlier)
        while pending:
            batch = pending.popleft()
            key = batch["key"][0].as_py()
            if key in given_up:
                outcomes.append(outcome_table([Outcome(key, rejected=given_up[key])]))
                continue
            try:
                worked, rows = sum(done.num_rows for done in outcomes), batch.num_rows
                for done in self._try(batch, partial(self._note, worked, rows), alone=suspected):
                    outcomes.append(done)
                    batch = drop_keys(batch, done["key"].to_pylist())
            except ChildLostError as error:
                suspected = True
                if error.shared:
                    log.warning("%s: lost a worker with two batches: %s", self._stage_run.stage, error)
                    if batch.num_rows:
                        pending.appendleft(batch)
                    continue
                lost = {key: counts.get(key, 0) + 1 for key in batch["key"].to_pylist()}
                counts |= lost
                log.warning(
                    "%s: lost a worker; %d passages of its batch are left: %s", self._stage_run.stage, len(lost), error
                )
                key = next(iter(lost), "")
                if len(lost) == 1 and lost[key] >= self._max_attempts:
                    outcomes.append(self._give_up(batch, lost[key], error))
                    given_up[key] = error.reason
                elif lost:
                    self._attempt_log.record_losses(lost)
                    pending.extendleft(reversed(_split(batch)))
        self._attempt_log.clear(counts.keys() - given_up.keys())
        self._board.end()
        return pa.concat_tables(outcomes)

    def _note(self, worked: int, rows: int, share: float) -> None:
        self._board.write(worked + rows * share)

    def _try(self, batch: pa.Table, on_progress: Heartbeat, *, alone: bool) -> Iterator[pa.Table]:
        for attempt in range(_START_ATTEMPTS):
            try:
                with self._place(self._lanes if alone else 1):
                    child = self._living_child()
                    try:
                        yield from child.call(batch, self._limits, on_progress)
                    except BaseException:
                        # After any error the child is of no more use.
                        with self._replacing:
                            if self._child is child:
                                self._child = None
                        raise
                return
            except ChildLostError as error:
                if not error.starting:
                    raise
                if attempt == _START_ATTEMPTS - 1:
                    raise PragError(
                        f"{self._stage_run.stage}: its worker dies as it starts: {error}",
                        "read the worker's log; give it more memory, or a smaller model",
                    ) from None

    def _living_child(self) -> Child:
        with self._replacing:
            self._child = self._child or Child(self._work, self._preload, self._lanes)
            return self._child

    @contextlib.contextmanager
    def _place(self, count: int) -> Iterator[None]:
        with self._taking:
            for _ in range(count):
                self._places.acquire()
        try:
            yield
        finally:
            self._places.release(count)

    def _give_up(self, batch: pa.Table, attempts: int, lost: ChildLostError) -> pa.Table:
        """Store the reject at once, so that the passage is not tried again; return its outcome."""
        (row,) = batch.select(["key", "sources"]).to_pylist()
        key, stage_run = row["key"], self._stage_run
        reject = Reject(stage_run.stage, lost.reason, lost.detail, row["sources"][0], key, attempts, stage_run.recipe)
        put_rejects(stage_run.store, stage_run.run, [reject])
        self._attempt_log.record_reject(key, attempts, lost.reason)
        return outcome_table([Outcome(key, rejected=lost.reason)])


def run_actors(
    actor: type,
    arguments: tuple[Any, ...],
    missing: ray.data.Dataset,
    batch: int,
    actors: Actors,
    stage_run: StageRun,
    preload: Sequence[str] = (),
    lanes: int = 1,
) -> ray.data.Dataset:
    """Return the outcomes of `missing`, to be made by a pool of `actor(*arguments)`.

    One block is one batch of `batch` passages; its outcomes are seen when the whole block is done. Each actor works in
    a child process. `preload` names modules that the actor imports only in its constructor. `lanes` is the number of
    batches that an actor holds at the same time, see `pipelines.execution.child_process.Actor`.
    """
    work = pickle.dumps((actor, arguments))
    # Ray shows a stage's workers under the name of their class.
    worker = type(actor.__name__, (IsolatedWorker,), {})
    return missing.repartition(target_num_rows_per_block=batch, strict=True).map_batches(
        worker,
        batch_size=batch,
        batch_format="pyarrow",
        fn_constructor_args=(work, (actor.__module__, *preload), stage_run, actors.memory_bytes, lanes),
        **actors.pool(lanes),
    )


def _split(batch: pa.Table) -> list[pa.Table]:
    rows = -(-batch.num_rows // _PARTS)
    return [batch.slice(begin, rows) for begin in range(0, batch.num_rows, rows)]
