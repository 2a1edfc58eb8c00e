"""How commands print their results."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import sys
import tempfile
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

# What is printed is text: no markup in brackets, no emoji by name. A path, a title or a key may hold either.
progress_to = Console(stderr=True, markup=False, emoji=False)
# Bound to the real standard output, see `result_only`.
out = Console(file=sys.stdout, markup=False, emoji=False)


@contextlib.contextmanager
def result_only(tell: bool = False) -> Iterator[None]:
    """Keep libraries away from the terminal: standard output gets the result, standard error this project's lines.

    What libraries write, and the processes that they start, goes to a file of its own, which is removed if it stays
    empty. With `tell` its place is said at once, and otherwise if the command fails. Where standard error is not the
    process's own, as in a notebook, what libraries print goes there.
    """
    if not _is_descriptor(sys.stderr, 2):
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    descriptor, name = tempfile.mkstemp(prefix="prag-", suffix=".log")
    path = Path(name)
    remove = functools.partial(_remove_if_empty, path)
    atexit.register(remove)  # also when a signal ends the command
    sys.stderr.flush()
    with os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace") as terminal:
        os.dup2(descriptor, 2)
        os.close(descriptor)
        progress_to.file = terminal
        try:
            with contextlib.redirect_stdout(sys.stderr), _own_log_lines(terminal):
                if tell:
                    progress_to.print(f"messages of Ray and other libraries: {path}", style="dim", soft_wrap=True)
                yield
        except Exception:
            sys.stderr.flush()
            if path.stat().st_size and not tell:
                progress_to.print(f"messages of libraries: {path}", style="dim", soft_wrap=True)
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal.fileno(), 2)
            progress_to.file = sys.stderr
            remove()
            atexit.unregister(remove)


def _is_descriptor(stream: Any, number: int) -> bool:
    try:
        return bool(stream.fileno() == number)
    except (AttributeError, OSError, ValueError):  # it is no file
        return False


def _remove_if_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:
            path.unlink()


@contextlib.contextmanager
def _own_log_lines(terminal: Any) -> Iterator[None]:
    """Show what this project logs on the terminal; other lines stay where they are."""
    root = logging.getLogger()
    shown = logging.StreamHandler(terminal)
    shown.addFilter(_is_own)
    added: list[logging.Handler] = []
    for handler in root.handlers:
        shown.setFormatter(handler.formatter)
        handler.addFilter(_is_foreign)
        added.append(handler)
    root.addHandler(shown)
    try:
        yield
    finally:
        root.removeHandler(shown)
        for handler in added:
            handler.removeFilter(_is_foreign)


def _is_own(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in ("cluster", "pipelines", "prag_core")


def _is_foreign(record: logging.LogRecord) -> bool:
    return not _is_own(record)


def print_table(
    title: str,
    rows: Iterable[Sequence[str | Text]],
    columns: Sequence[str] = (),
    right: Container[str] = (),
    whole: Container[str] = (),
) -> None:
    """Print a table.

    Args:
        title: The text above it.
        rows: The cells.
        columns: The column names; none when the rows are pairs of a name and a value.
        right: The columns that are aligned to the right.
        whole: The columns whose lines are not broken, such as ids that somebody will copy.
    """
    table = Table(title=title, show_header=bool(columns))
    for name in columns or ("", ""):
        side: Literal["left", "right"] = "right" if name in right else "left"
        table.add_column(name, justify=side, overflow="fold", no_wrap=name in whole)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def print_result(document: Any, text: str, as_json: bool) -> None:
    """Print a JSON document, or instead of it a text for people."""
    if as_json:
        print_json(document)
    else:
        out.print(text, highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """Print a JSON document on one line."""
    print_raw(json.dumps(document, ensure_ascii=False) + "\n")


def print_raw(text: str) -> None:
    """Print a text as it is, at once."""
    out.file.write(text)
    out.file.flush()
