"""The options that several commands share, and the configuration and store that they name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from prag_core import config
from prag_core.config_file import load_config
from prag_core.errors import InputError

if TYPE_CHECKING:
    from prag_core.store.objects import Store

Config = Annotated[str, typer.Option("--config", "-c", help="The YAML configuration.", envvar="PRAG_CONFIG")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting, e.g. `--set train.epochs=4`. May be given again."),
]
Profile = Annotated[
    str | None, typer.Option("--profile", help="Where to run: laptop, gpu or cluster; default: run.profile.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Snapshot = Annotated[
    str | None, typer.Option(help="Use this snapshot, not the one in service: its id, or the beginning of it.")
]
TakeOver = Annotated[
    bool, typer.Option("--take-over", help="Take the store's lease from a run that is known to be dead.")
]
Wait = Annotated[
    float, typer.Option("--wait", min=0, help="Seconds to wait for another run's lease, also for a dead run's.")
]

# The groups of commands in `prag --help`.
START, RUN, ASK, STORE, EVALUATE, CLUSTER = "Start", "Run", "Ask", "Store", "Evaluate", "Cluster"

# The configuration of commands without `--config`.
EXAMPLE = "package://pipelines/examples/demo.yaml"


def settings_of(path: str, overrides: list[str] | None, options: Mapping[str, object] | None = None) -> config.Config:
    """Read the configuration that a command's options name.

    Args:
        path: The file.
        overrides: The values of `--set`.
        options: Settings that have an option of their own, by dotted name; None where it was not given.

    Raises:
        ConfigError: see `prag_core.config_file.load_config`.
    """
    given = [f"{name}={value}" for name, value in (options or {}).items() if value is not None]
    return load_config(path, [*(overrides or []), *given])


def store_of(path: str, overrides: list[str] | None) -> Store:
    """Open the store of the configuration that a command's options name.

    Raises:
        ConfigError: when the configuration is wrong.
        StoreError: when there can be no store at its URL.
    """
    from prag_core.store.objects import open_store

    return open_store(settings_of(path, overrides))


def parse_age(text: str) -> float:
    """Return an age such as `24h`, `90m`, `7d` or `30s` in seconds.

    Raises:
        ValueError: when the text is not an age.
    """
    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd])", text)
    if not found:
        raise ValueError(f"{text!r} is not an age: write 30s, 90m, 24h or 7d")
    return float(found[1]) * units[found[2]]


def snapshot_of(settings: config.Config, given: str | None) -> str | None:
    """Return the id of the snapshot that `--snapshot` names in the configured store; None if it was not given.

    Raises:
        InputError: see `whole_id`.
    """
    from prag_core.store.objects import open_store

    return None if given is None else whole_id(open_store(settings), given)


def whole_id(store: Store, beginning: str) -> str:
    """Return the id of the snapshot that a user names by its id or the beginning of it.

    Raises:
        InputError: when no snapshot begins so, or more than one.
    """
    from prag_core.store.snapshot import snapshot_ids

    found = [id for id in snapshot_ids(store) if id.startswith(beginning)] if beginning else []
    if beginning in found or len(found) == 1:
        return beginning if beginning in found else found[0]
    if found:
        raise InputError(f"{len(found)} snapshots begin with {beginning!r}", "write more of the id")
    raise InputError(f"store = {store.url!r} has no snapshot {beginning!r}", "see `prag snapshots list`")
