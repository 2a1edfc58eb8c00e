"""`prag snapshots`: which there are, which serves, and which are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pipelines.cli.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, SetOption, out, print_json, print_rows
from prag_core.config import Config
from prag_core.config_file import load_config
from prag_core.errors import InputError

if TYPE_CHECKING:
    from prag_core.store.objects import Store


snapshots_app = typer.Typer(no_args_is_help=True, help="List, show, roll back to, pin and unpin snapshots.")

Snapshot = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="The id of a snapshot, or its beginning.")]

_SHOWN = 50


@snapshots_app.command(name="list")
def list_(config: ConfigOption = DEFAULT_CONFIG, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """List the snapshots, the oldest first: which serves, which are pinned, which `prag gc` keeps."""
    from prag_core.store.snapshot import current_id, kept_snapshots, list_snapshots, pinned

    settings = load_config(config, set_ or [])
    store = _open(settings)
    serving, pins = current_id(store), pinned(store)
    kept = kept_snapshots(store, settings.storage.keep_snapshots)
    found = list_snapshots(store)
    if as_json:
        marks = [{"serving": s.id == serving, "pinned": s.id in pins, "kept": s.id in kept} for s in found]
        print_json([{**asdict(s), **mark} for s, mark in zip(found, marks, strict=True)])
        return
    table = Table(title=f"{len(found)} snapshots")
    for name in ("id", "passages", "adapters", "forgotten", "recipe", ""):
        table.add_column(name, justify="right" if name in ("passages", "adapters", "forgotten") else "left")
    for s in found:
        marked = {"in service": s.id == serving, "pinned": s.id in pins, "old": s.id not in kept}
        notes = ", ".join(word for word, holds in marked.items() if holds)
        table.add_row(s.id, f"{s.passages:,}", f"{s.adapters:,}", f"{len(s.tombstones):,}", s.recipe, notes)
    out.print(table)


@snapshots_app.command()
def show(
    snapshot: Annotated[
        str | None, typer.Argument(help="Its id, or the beginning; default: the one in service.")
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show all that a snapshot names."""
    from prag_core.store.snapshot import load_snapshot

    store = _open(load_config(config, set_ or []))
    found = load_snapshot(store, _whole_id(store, snapshot) if snapshot else None)
    if as_json:
        print_json(asdict(found))
        return
    fields = asdict(found).items()
    words = [(name, "\n".join(_cut(value)) if isinstance(value, tuple) else str(value)) for name, value in fields]
    print_rows(f"Snapshot {found.id}", words)


@snapshots_app.command()
def rollback(
    snapshot: Snapshot, config: ConfigOption = DEFAULT_CONFIG, set_: SetOption = None, as_json: JsonOption = False
) -> None:
    """Put another snapshot, older or newer, into service. What was forgotten stays forgotten."""
    from prag_core.store import snapshot as snapshots

    store = _open(load_config(config, set_ or []))
    serving = snapshots.rollback(store, _whole_id(store, snapshot)).id
    _say(as_json, {"serving": serving}, f"snapshot {serving} is in service")


@snapshots_app.command()
def pin(
    snapshot: Snapshot, config: ConfigOption = DEFAULT_CONFIG, set_: SetOption = None, as_json: JsonOption = False
) -> None:
    """Keep a snapshot, and all that it names, whatever its age."""
    from prag_core.store import snapshot as snapshots

    store = _open(load_config(config, set_ or []))
    id = _whole_id(store, snapshot)
    snapshots.pin(store, id)
    _say(as_json, {"pinned": list(snapshots.pinned(store))}, f"snapshot {id} is pinned")


@snapshots_app.command()
def unpin(
    snapshot: Snapshot, config: ConfigOption = DEFAULT_CONFIG, set_: SetOption = None, as_json: JsonOption = False
) -> None:
    """Let a snapshot go with its age again."""
    from prag_core.store import snapshot as snapshots

    store = _open(load_config(config, set_ or []))
    id = _whole_id(store, snapshot)
    snapshots.unpin(store, id)
    _say(as_json, {"pinned": list(snapshots.pinned(store))}, f"snapshot {id} is pinned no more")


def _open(settings: Config) -> Store:
    from prag_core.store.objects import open_store

    return open_store(settings)


def _whole_id(store: Store, beginning: str) -> str:
    ids = [name.removeprefix("snapshots/").removesuffix(".json") for name in store.list("snapshots", ".json")]
    found = [id for id in ids if id.startswith(beginning)]
    if beginning in found or len(found) == 1:
        return beginning if beginning in found else found[0]
    if found:
        raise InputError(f"{len(found)} snapshots begin with {beginning!r}", "write more of the id")
    raise InputError(f"store = {store.url!r} has no snapshot {beginning!r}", "see `prag snapshots list`")


def _say(as_json: bool, document: dict[str, Any], words: str) -> None:
    if as_json:
        print_json(document)
    else:
        out.print(words, highlight=False)


def _cut(names: Sequence[str]) -> list[str]:
    return [*names[:_SHOWN], *([f"… and {len(names) - _SHOWN:,} more"] if len(names) > _SHOWN else [])] or ["none"]
