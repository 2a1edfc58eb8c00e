"""Parses lines of JSON and TSV so strictly that no damaged line passes for a good one, or hides the lines after it."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

NOT_CLOSED = "a quote is not closed"


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: for text that is not JSON, for an object with a key twice, and for nesting or numbers beyond
            Python's limits.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {repeated(key for key, _ in pairs)[0]!r} comes twice in an object")
    return found


def json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """Yield the line number, from 1, and the value of each line of JSON Lines; a bad line gives its ValueError.

    Blank lines are left out.
    """
    # Not splitlines, which also splits at line separators that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                yield number, error


def parse_tsv(line: str) -> list[str]:
    """Return the fields of one line of TSV, a row of its own; a blank line has none.

    Fields may be quoted, with a quote doubled in them. But a field that goes on in the next line is refused: nothing
    tells it from a stray quote, which would swallow the rows up to the next one.

    Raises:
        ValueError: when the line is not a row.
    """
    # csv limits a field to 131,072 characters, for the whole process; the callers limit the line.
    csv.field_size_limit(max(csv.field_size_limit(), len(line)))
    try:
        return next(csv.reader([line], delimiter="\t", strict=True), [])
    except csv.Error as error:
        raise ValueError(explain_tsv(error)) from None


def explain_tsv(error: csv.Error) -> str:
    """Return what is wrong with a row that `csv` refuses."""
    if "new-line character" in str(error):
        return "there is a carriage return outside quotes; lines end with a line feed"
    if "unexpected end of data" in str(error):
        return f"{NOT_CLOSED}; a field with a quote must be quoted, its quotes doubled"
    return f"{error}; a field with a double quote must be quoted, its quotes doubled"


def is_storable(text: str) -> bool:
    """Return whether UTF-8 can store a text. It cannot store a lone surrogate, which JSON and paths can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def repeated(names: Iterator[str] | Sequence[str]) -> list[str]:
    """Return the names that occur more than once, in their order."""
    return [name for name, count in Counter(names).items() if count > 1]
