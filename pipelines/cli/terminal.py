"""What the commands share: their common options, and how they print results."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from prag_core.config import Config
from prag_core.config_file import load_config

if TYPE_CHECKING:
    from prag_core.store.objects import Store

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="The YAML configuration.", envvar="PRAG_CONFIG", show_default=True)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting, e.g. `--set train.epochs=4`. May be given again."),
]
ProfileOption = Annotated[
    str | None, typer.Option("--profile", help="Where to run: laptop, gpu or cluster; default: run.profile.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a text for people.")]
TakeOverOption = Annotated[
    bool, typer.Option("--take-over", help="Take the store's lease from a run that is known to be dead.")
]
WaitOption = Annotated[
    float, typer.Option("--wait", min=0, help="Seconds to wait for another run's lease, also for a dead run's.")
]

DEFAULT_CONFIG = "package://pipelines/examples/demo.yaml"
NO_OPTIONS: Mapping[str, object] = MappingProxyType({})
progress_to = Console(stderr=True)
# Bound to the real standard output, see `result_only`.
out = Console(file=sys.stdout)


def settings_of(config: str, overrides: list[str] | None, options: Mapping[str, object] = NO_OPTIONS) -> Config:
    """Read the configuration that a command's options name.

    Args:
        config: The file.
        overrides: What `--set` gave.
        options: Settings that have an option of their own, by dotted name; None where it was not given.

    Raises:
        ConfigError: see `prag_core.config_file.load_config`.
    """
    given = [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
    return load_config(config, [*(overrides or []), *given])


def store_of(config: str, overrides: list[str] | None) -> Store:
    """Open the store of the configuration that a command's options name.

    Raises:
        ConfigError: when the configuration is wrong.
        StoreError: when there can be no store at its URL.
    """
    from prag_core.store.objects import open_store

    return open_store(settings_of(config, overrides))


def result_only() -> contextlib.AbstractContextManager[Any]:
    """Send what libraries print to standard error, so that standard output has the result alone."""
    return contextlib.redirect_stdout(sys.stderr)


def print_table(
    title: str,
    rows: Iterable[Sequence[str]],
    columns: Sequence[str] = (),
    right: Container[str] = (),
) -> None:
    """Print a table.

    Args:
        title: What stands above it.
        rows: The cells, in the console's markup.
        columns: The column names; none when the rows are pairs of a name and a value.
        right: The columns that are aligned to the right.
    """
    table = Table(title=title, show_header=bool(columns))
    for name in columns or ("", ""):
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out.print(table)


def print_json(document: Any) -> None:
    """Print a JSON document on one line."""
    print_raw(json.dumps(document, ensure_ascii=False) + "\n")


def print_raw(text: str) -> None:
    """Print a text as it is, at once."""
    out.file.write(text)
    out.file.flush()


def parse_age(text: str) -> float:
    """Return an age such as `24h`, `90m`, `7d` or `30s` in seconds.

    Raises:
        ValueError: when the text is not an age.
    """
    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    if not text[:-1].replace(".", "", 1).isdigit() or text[-1:] not in units:
        raise ValueError(f"{text!r} is not an age: write 30s, 90m, 24h or 7d")
    return float(text[:-1]) * units[text[-1]]
