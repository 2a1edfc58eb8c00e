"""How commands print their results."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Container, Iterable, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

# What is printed is text: no markup in brackets, no emoji by name. A path, a title or a key may hold either.
progress_to = Console(stderr=True, markup=False, emoji=False)
# Bound to the real standard output, see `result_only`.
out = Console(file=sys.stdout, markup=False, emoji=False)


def result_only() -> contextlib.AbstractContextManager[Any]:
    """Send what libraries print to standard error, so that standard output has the result alone."""
    return contextlib.redirect_stdout(sys.stderr)


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
