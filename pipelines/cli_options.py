"""Options that many commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prag_core.config import Config, load_config

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="The YAML configuration.", envvar="PRAG_CONFIG", show_default=True)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting, e.g. `--set train.epochs=4`. May be given again."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a text for people.")]
ProfileOption = Annotated[
    str | None, typer.Option("--profile", help="Where it runs: laptop, gpu or cluster; default: run.profile.")
]

DEFAULT_CONFIG = Path("examples/demo.yaml")


def settings_of(config: Path, overrides: list[str] | None, profile: str | None = None) -> Config:
    """Return the configuration of a command's options.

    Raises:
        ConfigError: see `prag_core.config.load_config`.
    """
    return load_config(config, [*(overrides or []), *([f"run.profile={profile}"] if profile else [])])
