"""What all commands share: options that each takes, and how results are shown."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from prag_core.config import Config
from prag_core.config_file import load_config

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="The YAML configuration.", envvar="PRAG_CONFIG", show_default=True)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting, e.g. `--set train.epochs=4`. May be given again."),
]
ProfileOption = Annotated[
    str | None, typer.Option("--profile", help="Where it runs: laptop, gpu or cluster; default: run.profile.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a text for people.")]

DEFAULT_CONFIG = Path("examples/demo.yaml")
progress_to = Console(stderr=True)
# Bound to the real standard output, see `result_only`.
out = Console(file=sys.stdout)


def settings_of(config: Path, overrides: list[str] | None, profile: str | None = None) -> Config:
    """Return the configuration of a command's options.

    Raises:
        ConfigError: see `prag_core.config_file.load_config`.
    """
    return load_config(config, [*(overrides or []), *([f"run.profile={profile}"] if profile else [])])


def result_only() -> contextlib.AbstractContextManager[Any]:
    """Within this context, what libraries print goes to standard error: standard output is for the result alone."""
    return contextlib.redirect_stdout(sys.stderr)


def print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values as a table."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column()
    for row in rows:
        table.add_row(*row)
    out.print(table)


def print_json(document: Any) -> None:
    """Print one JSON document on one line."""
    out.file.write(json.dumps(document, ensure_ascii=False) + "\n")
    out.file.flush()


def bytes_text(size: float) -> str:
    """Return a number of bytes in words, in powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def parse_age(text: str) -> float:
    """Return an age such as `24h`, `90m`, `7d` or `30s` in seconds.

    Raises:
        ValueError: when it is none.
    """
    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    if not text[:-1].replace(".", "", 1).isdigit() or text[-1:] not in units:
        raise ValueError(f"{text!r} is no age: write 30s, 90m, 24h or 7d")
    return float(text[:-1]) * units[text[-1]]
