"""`prag snapshots`: list the snapshots, put one into service, keep one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from pipelines.cli import options
from pipelines.cli.terminal import print_json, print_result, print_table
from pipelines.words import counted

app = typer.Typer(no_args_is_help=True, help="List, show, roll back to, pin and unpin snapshots.")

SnapshotArgument = Annotated[
    str, typer.Argument(metavar="SNAPSHOT", help="The id of a snapshot, or the beginning of it.")
]

_SHOWN = 50
# Digits of a hash that tell two recipes of one name apart.
_HASH_SHOWN = 8


@app.command("list", epilog="Example: `prag snapshots list -c config.yaml`")
def list_(config: options.Config = options.EXAMPLE, set_: options.Set = None, as_json: options.Json = False) -> None:
    """List the snapshots, the oldest first: which one serves, which are pinned, which `prag gc` keeps."""
    from prag_core.store.pins import kept_snapshots, pinned
    from prag_core.store.snapshot import current_id, list_snapshots, recipe_name

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
        forgotten = f"{len(s.tombstones):,} forgotten"
        marked = {"in service": s.id == serving, "pinned": s.id in pins, "old": s.id not in kept}
        notes = ", ".join(note for note, holds in {**marked, forgotten: s.tombstones}.items() if holds)
        recipe = f"{recipe_name(store, s)}\n{s.recipe[:_HASH_SHOWN]}".strip()
        # The notes stand below the id, so that the table fits into 80 columns with whole ids.
        rows.append((f"{s.id}\n{notes}".strip(), f"{s.passages:,}", f"{s.adapters:,}", recipe))
    numbers = ("passages", "adapters")
    print_table(counted(len(found), "snapshot"), rows, ("id", *numbers, "recipe"), right=numbers, whole=("id",))


@app.command(epilog="Example: `prag snapshots show -c config.yaml 20261129T14`")
def show(
    snapshot: Annotated[
        str | None, typer.Argument(help="The id, or the beginning of it; default: the snapshot in service.")
    ] = None,
    config: options.Config = options.EXAMPLE,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Show everything that a snapshot names."""
    from prag_core.store.snapshot import load_snapshot, recipe_name

    store = options.store_of(config, set_)
    found = load_snapshot(store, options.whole_id(store, snapshot) if snapshot is not None else None)
    if as_json:
        print_json(asdict(found))
        return
    fields = {**asdict(found), "recipe": f"{recipe_name(store, found)} {found.recipe}".strip()}
    route = fields["route"] or {}
    fields["route"] = tuple(f"{name} {value}" for name, value in route.items()) or "not fitted"
    rows = [
        (name.replace("_", " "), "\n".join(_cut(value)) if isinstance(value, tuple) else str(value))
        for name, value in fields.items()
    ]
    print_table(f"Snapshot {found.id}", rows)


@app.command(epilog="Example: `prag snapshots rollback -c config.yaml 20261129T14`")
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


@app.command(epilog="Example: `prag snapshots pin -c config.yaml 20261129T14`")
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


@app.command(epilog="Example: `prag snapshots unpin -c config.yaml 20261129T14`")
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
