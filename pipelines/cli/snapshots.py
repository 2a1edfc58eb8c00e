"""`prag snapshots`: list the snapshots, put one into service, keep one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from pipelines.cli import options
from pipelines.cli.terminal import print_json, print_result, print_table

app = typer.Typer(no_args_is_help=True, help="List, show, roll back to, pin and unpin snapshots.")

SnapshotArgument = Annotated[
    str, typer.Argument(metavar="SNAPSHOT", help="The id of a snapshot, or the beginning of it.")
]

_SHOWN = 50


@app.command("list")
def list_(config: options.Config = options.EXAMPLE, set_: options.Set = None, as_json: options.Json = False) -> None:
    """List the snapshots, the oldest first: which one serves, which are pinned, which `prag gc` keeps."""
    from prag_core.store.pins import kept_snapshots, pinned
    from prag_core.store.snapshot import current_id, list_snapshots

    store = options.store_of(config, set_)
    serving, pins = current_id(store), pinned(store)
    kept = kept_snapshots(store, options.settings_of(config, set_).storage.keep_snapshots)
    found = list_snapshots(store)
    if as_json:
        marks = [{"serving": s.id == serving, "pinned": s.id in pins, "kept": s.id in kept} for s in found]
        print_json([{**asdict(s), **mark} for s, mark in zip(found, marks, strict=True)])
        return
    rows = []
    for s in found:
        marked = {"in service": s.id == serving, "pinned": s.id in pins, "old": s.id not in kept}
        notes = ", ".join(note for note, holds in marked.items() if holds)
        rows.append((s.id, f"{s.passages:,}", f"{s.adapters:,}", f"{len(s.tombstones):,}", s.recipe, notes))
    numbers = ("passages", "adapters", "forgotten")
    print_table(f"{len(found)} snapshots", rows, ("id", *numbers, "recipe", ""), right=numbers)


@app.command()
def show(
    snapshot: Annotated[
        str | None, typer.Argument(help="The id, or the beginning of it; default: the snapshot in service.")
    ] = None,
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Show everything that a snapshot names."""
    from prag_core.store.snapshot import load_snapshot

    store = options.store_of(config, set_)
    found = load_snapshot(store, options.whole_id(store, snapshot) if snapshot is not None else None)
    if as_json:
        print_json(asdict(found))
        return
    fields = asdict(found).items()
    rows = [(name, "\n".join(_cut(value)) if isinstance(value, tuple) else str(value)) for name, value in fields]
    print_table(f"Snapshot {found.id}", rows)


@app.command()
def rollback(
    snapshot: SnapshotArgument,
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Put another snapshot, older or newer, into service. Forgotten passages stay forgotten."""
    from prag_core.store.snapshot import rollback

    store = options.store_of(config, set_)
    serving = rollback(store, options.whole_id(store, snapshot)).id
    print_result({"serving": serving}, f"snapshot {serving} is in service", as_json)


@app.command()
def pin(
    snapshot: SnapshotArgument,
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Keep a snapshot and everything it names, whatever its age."""
    from prag_core.store.pins import pin, pinned

    store = options.store_of(config, set_)
    id = options.whole_id(store, snapshot)
    pin(store, id)
    print_result({"pinned": list(pinned(store))}, f"snapshot {id} is pinned", as_json)


@app.command()
def unpin(
    snapshot: SnapshotArgument,
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Let `prag gc` remove a snapshot once it is old."""
    from prag_core.store.pins import pinned, unpin

    store = options.store_of(config, set_)
    id = options.whole_id(store, snapshot)
    unpin(store, id)
    print_result({"pinned": list(pinned(store))}, f"snapshot {id} is no longer pinned", as_json)


def _cut(names: Sequence[str]) -> list[str]:
    return [*names[:_SHOWN], *([f"… and {len(names) - _SHOWN:,} more"] if len(names) > _SHOWN else [])] or ["none"]
