"""Progress of long stages: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int, int], None]


@contextmanager
def stage_progress(console: Console, stage: str, total: int, unit: str = "passages") -> Iterator[Advance]:
    """Yield a function to be called with (done, rejected) so far of the `total` of a stage."""
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
