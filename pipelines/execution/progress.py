"""Progress of a run: bars or lines on the terminal, `progress.json` in the store, counters for Prometheus."""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import ray.data
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cluster.resources import Actors
from pipelines.execution.metrics import PipelineMetrics
from pipelines.execution.outcomes import Budget, Outcome, StageReport, Tally, outcome_blocks
from pipelines.words import duration
from prag_core.errors import PragError, StoreError
from prag_core.store.objects import Store

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_WRITES = 5.0


class RunProgress:
    """Writes the progress of a run to the console, to `runs/<run>/progress.json` and to Prometheus.

    The document is written when a stage begins or ends, at most every five seconds in between, and when the run ends
    or fails. A run that was killed leaves `running` in it (see `pipelines.jobs.status`).
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

    @cached_property
    def _metrics(self) -> PipelineMetrics:
        return PipelineMetrics()  # only once Ray runs

    @property
    def stages(self) -> tuple[StageReport, ...]:
        """The reports of the finished stages."""
        return tuple(self._stages)

    @contextmanager
    def stage(self, stage: str, total: int, tally: Tally) -> Iterator[Callable[[Sequence[Outcome]], None]]:
        """Yield a function to call with each block of outcomes once `tally` has counted it."""
        self._metrics.begin(stage, total)
        self._describe(stage, total, tally)
        self._write()
        try:
            with stage_progress(self.console, stage, total) as show:

                def advance(outcomes: Sequence[Outcome]) -> None:
                    self._metrics.count(stage, outcomes)
                    self._describe(stage, total, tally)
                    if time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
                        self._write()
                    show(tally.done, tally.rejected.total())

                yield advance
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

    def _describe(self, stage: str, total: int, tally: Tally) -> None:
        finished = tally.done + tally.rejected.total()
        rate = finished / tally.seconds if tally.seconds else 0.0
        self._current = {
            "stage": stage,
            "total": total,
            "done": tally.done,
            "rejected": dict(tally.rejected),
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
def stage_progress(
    console: Console, stage: str, total: int, unit: str = "passages"
) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with the numbers (done, rejected) so far, of `total`."""
    if console.is_terminal:
        with _bar(console, unit) as progress:
            task = progress.add_task(stage, total=total, rate=0.0, rejects=0)
            begun = time.perf_counter()

            def advance(done: int, rejected: int) -> None:
                rate = (done + rejected) / max(time.perf_counter() - begun, 1e-9)
                progress.update(task, completed=done + rejected, rate=rate, rejects=rejected)

            yield advance
        return
    begun = last = time.perf_counter()
    console.print(f"{stage}: {total} to do")

    def report(done: int, rejected: int) -> None:
        nonlocal last
        now = time.perf_counter()
        finished = done + rejected
        if finished < total and now - last < _SECONDS_BETWEEN_LINES:
            return
        last = now
        rate = finished / (now - begun)
        left = f"{(total - finished) / rate:.0f} s left" if rate else "time left unknown"
        console.print(f"{stage}: {finished}/{total}, {rate:.2f} {unit}/s, {left}, {rejected} rejected")

    yield report


def _bar(console: Console, unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{{task.fields[rate]:.2f}} {unit}/s"),
        TextColumn("{task.fields[rejects]} rejected"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
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
            tally.add(block)
            advance(block)
            budget.check({f"{stage}/{reason}": n for reason, n in tally.rejected.items()})
    return tally
