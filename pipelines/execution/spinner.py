"""A line that moves while something takes its time before there is anything to count."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def spinner(console: Console, text: str) -> Iterator[None]:
    """Show `text` with a spinner and the time on a terminal, and nothing afterwards; elsewhere show nothing.

    Only one of these, or one bar, can be shown at a time.
    """
    if not console.is_terminal:
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(text, total=None)
        yield
