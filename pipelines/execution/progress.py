"""Progress of a run: bars or lines on the terminal, `progress.json` in the store, counters for Prometheus."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Protocol

import ray.data
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cluster.resources import Actors
from pipelines.execution.board import BoardReader
from pipelines.execution.metrics import PipelineMetrics
from pipelines.execution.outcomes import Budget, Outcome, StageReport, Tally, outcome_blocks
from pipelines.words import duration
from prag_core.errors import PragError, StoreError
from prag_core.store.objects import Store

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_WRITES = 5.0
_SECONDS_BETWEEN_LOOKS = 1.0


class Show(Protocol):
    """Shows how far a stage is."""

    def __call__(self, done: int, rejected: int, working: float = 0.0) -> None:
        """Show the passages done and rejected; `working` is what was worked on in batches that have not ended."""
        ...


class RunProgress:
    """Writes the progress of a run to the console, to `runs/<run>/progress.json` and to Prometheus.

    The document is written when a stage begins or ends, every five seconds in between, and when the run ends or fails.
    A run that was killed leaves `running` in it (see `pipelines.jobs.status`).
    """

    def __init__(self, store: Store, run: str, console: Console) -> None:
        self.run = run
        self.console = console
        self._store = store
        self._started = _now()
        self._stages: list[StageReport] = []
        self._current: dict[str, Any] | None = None
        self._recoveries = 0
        self._written = 0.0
        self._stopped = False
        # The thread that shows what the board says writes beside the one that counts outcomes.
        self._lock = threading.Lock()

    @cached_property
    def _metrics(self) -> PipelineMetrics:
        return PipelineMetrics()  # only once Ray runs

    @cached_property
    def _board(self) -> BoardReader:
        return BoardReader()

    @property
    def board(self) -> Any:
        """The board on which workers write how far they are within a batch; Ray must be running."""
        return self._board.handle

    @property
    def stages(self) -> tuple[StageReport, ...]:
        """The reports of the finished stages."""
        return tuple(self._stages)

    @contextmanager
    def stage(self, stage: str, total: int, tally: Tally) -> Iterator[Callable[[Sequence[Outcome]], None]]:
        """Yield a function to call with each block of outcomes; it counts them in `tally`."""
        self._metrics.begin(stage, total)
        self._board.clear()
        self._describe(stage, total, tally)
        self._write()
        ended = threading.Event()
        try:
            with stage_progress(self.console, stage, total) as show:

                def tell(working: float) -> None:
                    with self._lock:
                        self._describe(stage, total, tally, working)
                        if time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
                            self._write()
                        show(tally.done, tally.rejected.total(), working)

                def look() -> None:
                    while not ended.wait(_SECONDS_BETWEEN_LOOKS):
                        tell(self._board.read())

                def advance(outcomes: Sequence[Outcome]) -> None:
                    with self._lock:
                        tally.add(outcomes)
                    self._metrics.count(stage, outcomes)
                    tell(self._board.read())

                looking = threading.Thread(target=look, name="progress", daemon=True)
                looking.start()
                try:
                    yield advance
                finally:
                    ended.set()
                    looking.join()
        finally:
            self._metrics.end(stage)

    def recovered(self, stage: str, cause: BaseException) -> None:
        """Report that a stage lost a node or a process, and goes on with the passages that are missing."""
        self._recoveries += 1
        self._metrics.recovered(stage)
        lines = str(cause).strip().splitlines()
        self.console.print(f"{stage}: lost a part of the cluster ({type(cause).__name__}: {lines[0] if lines else ''})")
        self.console.print(f"{stage}: goes on with the passages that the store lacks")
        self._write()

    def finish(self, report: StageReport) -> StageReport:
        """Record and print the report of a finished stage, and return it.

        Raises:
            PragError: when its counts do not add up.
        """
        if not report.balanced:
            raise PragError(
                f"{report.stage}: {report.taken} in, but {report.done} done and {dict(report.rejected)} rejected"
            )
        self.console.print(
            f"{report.stage}: {report.done} of {report.taken} done in {duration(report.seconds)} "
            f"({report.earlier} reused, {sum(report.rejected.values())} rejected)"
        )
        self._stages.append(report)
        self._current = None
        self._write()
        return report

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record that the run is running within this context, and how it ended.

        If the interpreter exits meanwhile, the run was stopped, whatever the context raises then.
        """
        self._write()
        atexit.register(self._stop)
        try:
            yield
        except BaseException as error:
            self._write("failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            atexit.unregister(self._stop)
        self._write("finished")

    def _stop(self) -> None:
        self._write("stopped")
        self._stopped = True

    def _describe(self, stage: str, total: int, tally: Tally, working: float = 0.0) -> None:
        finished = min(tally.done + tally.rejected.total() + working, total)
        rate = finished / tally.seconds if tally.seconds else 0.0
        self._current = {
            "stage": stage,
            "total": total,
            "done": tally.done,
            "rejected": dict(tally.rejected),
            "share": round(finished / total, 3) if total else 1.0,
            "tokens": tally.tokens,
            "seconds": round(tally.seconds, 1),
            "passages_per_s": round(rate, 3),
            "seconds_left": round((total - finished) / rate) if rate else None,
        }

    def _write(self, state: str = "running", error: str = "") -> None:
        if self._stopped:
            return
        document = {
            "run": self.run,
            "state": state,
            "started": self._started,
            "updated": _now(),
            "stages": [stage.to_json() for stage in self._stages],
            "current": self._current,
            "recoveries": self._recoveries,
            "error": error,
        }
        self._written = time.monotonic()
        try:
            self._store.put_json(f"runs/{self.run}/progress.json", document)
        except StoreError as problem:  # the run itself fails elsewhere if the store is gone
            log.warning("progress.json could not be written: %s", problem)


@contextmanager
def stage_progress(console: Console, stage: str, total: int, unit: str = "passages") -> Iterator[Show]:
    """Yield a function to call with what is done of `total` so far; the bar also moves with what is being worked on."""
    begun = time.perf_counter()
    furthest = 0.0

    def rate_of(done: int, rejected: int, working: float) -> float:
        # A batch that ends is counted by its outcomes, a moment before or after it leaves the board.
        nonlocal furthest
        furthest = max(furthest, min(done + rejected + working, total))
        return furthest / max(time.perf_counter() - begun, 1e-9)

    if console.is_terminal:
        with _bar(console, unit) as progress:
            task = progress.add_task(stage, total=total, finished=0, rate=0.0, rejects=0)

            def advance(done: int, rejected: int, working: float = 0.0) -> None:
                rate = rate_of(done, rejected, working)
                finished = done + rejected
                progress.update(task, completed=furthest, finished=finished, rate=rate, rejects=rejected)

            yield advance
        return
    last = begun
    console.print(f"{stage}: {total} to do")

    def report(done: int, rejected: int, working: float = 0.0) -> None:
        nonlocal last
        now, finished = time.perf_counter(), done + rejected
        if finished < total and now - last < _SECONDS_BETWEEN_LINES:
            return
        last = now
        rate = rate_of(done, rejected, working)
        share, left = "", ""
        if finished < total:
            share = f" ({furthest / total:.0%})"
            left = f"{duration((total - furthest) / rate)} left, " if rate else "time left unknown, "
        console.print(f"{stage}: {finished}/{total}{share}, {rate:.2f} {unit}/s, {left}{rejected} rejected")

    yield report


def _bar(console: Console, unit: str) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:>8}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[finished]}/{task.total:.0f}"),
        TextColumn(f"{{task.fields[rate]:.2f}} {unit}/s"),
        TextColumn("{task.fields[rejects]} rejected"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def run_pool(
    actor: type,
    arguments: tuple[Any, ...],
    rows: ray.data.Dataset,
    *,
    total: int,
    batch: int,
    stage: str,
    actors: Actors,
    console: Console,
) -> Tally:
    """Run a pool of actors on `rows`, in blocks of `batch`, and show the progress; they are not isolated."""
    outcomes = rows.repartition(target_num_rows_per_block=batch, strict=True).map_batches(
        actor, batch_size=batch, batch_format="pyarrow", fn_constructor_args=arguments, **actors.pool()
    )
    tally = Tally()
    with stage_progress(console, stage, total, "rows") as advance:
        for block in outcome_blocks(outcomes):
            tally.add(block)
            advance(tally.done, tally.rejected.total())
    return tally


def follow_outcomes(outcomes: ray.data.Dataset, total: int, stage: str, progress: RunProgress, budget: Budget) -> Tally:
    """Run a stage's pipeline to its end; count and report its outcomes as they come.

    Raises:
        BudgetError: as soon as the rejects exceed the budget.
    """
    tally = Tally()
    with progress.stage(stage, total, tally) as advance:
        for block in outcome_blocks(outcomes):
            advance(block)
            budget.check({f"{stage}/{reason}": n for reason, n in tally.rejected.items()})
    return tally
