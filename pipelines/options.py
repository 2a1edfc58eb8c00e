"""Options and manners that all commands share."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="The YAML configuration.", envvar="PRAG_CONFIG", show_default=True)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting, e.g. `--set train.epochs=4`. May be given again."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a text for people.")]

DEFAULT_CONFIG = Path("examples/demo.yaml")


def result_only() -> contextlib.AbstractContextManager[Any]:
    """Within this context, what libraries print goes to standard error: standard output is for the result alone."""
    return contextlib.redirect_stdout(sys.stderr)
