"""Snapshots: immutable documents, each of which names all that an answer needs. `CURRENT` names the one in service.

`CURRENT` changes by a conditional write, so of several publishers at once one wins, and the others are told.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from prag_core.data.parsing import parse_json
from prag_core.errors import ConflictError, DamagedError, StoreError
from prag_core.identity import fingerprint
from prag_core.records import Route, from_document
from prag_core.store.objects import Store

CURRENT = "CURRENT"
ANY = "*"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The names of one corpus version, one index, and the ledger parts of one recipe.

    `tombstones` are the keys of forgotten passages, which must not be used any more. `route` are the thresholds of the
    mode `auto`; None, and no part of the document, if they were never fitted. `id` is the time of creation
    followed by a fingerprint of all else, so in the order of ids the newest snapshot is the last; see `created_now`.
    """

    id: str = ""
    created: str = ""
    corpus_version: str
    index: str
    recipe: str
    base_model: str
    ledger_parts: tuple[str, ...]
    passages: int
    adapters: int
    tombstones: tuple[str, ...] = ()
    route: Route | None = None


def created_now(snapshot: Snapshot) -> Snapshot:
    """Return a snapshot with the current time, and the id that follows from it and the content."""
    return with_id(replace(snapshot, created=datetime.now(UTC).isoformat(timespec="microseconds")))


def answers_of(snapshot: Snapshot) -> dict[str, Any]:
    """Return the part of a snapshot that its answers to given passages depend on, and what is forgotten in it.

    Evaluations of snapshots that are alike in it share their stored answers.
    """
    return {
        "base_model": snapshot.base_model,
        "recipe": snapshot.recipe,
        "ledger_parts": list(snapshot.ledger_parts),
        "tombstones": list(snapshot.tombstones),
    }


def with_tombstones(snapshot: Snapshot, keys: Iterable[str]) -> Snapshot:
    """Return a new snapshot in which the passages of these keys are forgotten too."""
    return created_now(replace(snapshot, tombstones=tuple(sorted({*snapshot.tombstones, *keys}))))


def without_tombstones(snapshot: Snapshot, keys: Iterable[str]) -> Snapshot:
    """Return a new snapshot in which the passages of these keys are not forgotten any more."""
    return created_now(replace(snapshot, tombstones=tuple(sorted({*snapshot.tombstones} - {*keys}))))


def with_ledger(snapshot: Snapshot, parts: Iterable[str], adapters: int) -> Snapshot:
    """Return a new snapshot with other ledger parts; `adapters` says how many passages they have adapters for."""
    return created_now(replace(snapshot, ledger_parts=tuple(sorted(parts)), adapters=adapters))


def with_route(snapshot: Snapshot, route: Route) -> Snapshot:
    """Return a new snapshot with these thresholds of the mode `auto`."""
    return created_now(replace(snapshot, route=route))


def kept_route(before: Snapshot | None, recipe: str) -> Route | None:
    """Return the thresholds that a snapshot of this recipe takes over from the one before it.

    They were fitted to the answers of a recipe's adapters, so another recipe has none.
    """
    return before.route if before and before.recipe == recipe else None


def current_id(store: Store) -> str | None:
    """Return the id of the snapshot in service, or None before the first publication.

    Raises:
        StoreError: if `CURRENT` cannot be read, or is damaged.
    """
    return parse_current(store, store.get_if_exists(CURRENT))


def encode_current(id: str) -> bytes:
    """Return the content of `CURRENT` that puts a snapshot into service."""
    return json.dumps({"snapshot": id}).encode()


def parse_current(store: Store, data: bytes | None) -> str | None:
    """Return the id of the snapshot that the content of `CURRENT` puts into service; None if there is no `CURRENT`.

    Raises:
        StoreError: if the content is damaged.
    """
    if data is None:
        return None
    if not isinstance(id := parse_field(store, CURRENT, data, "snapshot"), str):
        raise DamagedError(f"{store.url}/{CURRENT}: {id!r} is no snapshot's id")
    return id


def document_name(id: str) -> str:
    """Return the name of a snapshot's document in the store."""
    return f"snapshots/{id}.json"


def snapshot_id(name: str) -> str:
    """Return the id of the snapshot whose document or candidate mark has this name."""
    return posixpath.basename(name).removesuffix(".json").removesuffix(".candidate")


def snapshot_ids(store: Store) -> list[str]:
    """Return the ids of all snapshots of a store, the oldest first."""
    return [snapshot_id(name) for name in store.list("snapshots", ".json")]


def load_snapshot(store: Store, id: str | None = None) -> Snapshot:
    """Return a snapshot, by default the one in service, after checking it against its id.

    Raises:
        StoreError: if nothing is published yet, there is no such snapshot, or it is damaged.
    """
    id = id or current_id(store)
    if id is None:
        raise StoreError(
            f"store = {store.url!r}: nothing is published yet",
            "run `prag run` first, with the same -c (without it, commands use the packaged example)",
        )
    document = store.get_json(document_name(id))
    try:
        given = {field: tuple(document[field]) for field in ("ledger_parts", "tombstones")}
        route = from_document(Route, document["route"]) if "route" in document else None
        snapshot = Snapshot(**{**document, **given, "route": route})
        if snapshot.id != id or with_id(snapshot).id != id:
            raise ValueError("its content does not match its id")
        for name in (snapshot.corpus_version, snapshot.index, snapshot.recipe):
            # Each is the name of a folder: of the store, and that of an index of the local cache, too.
            if "/" in name or name in ("", ".", ".."):
                raise ValueError(f"{name!r} is no name of a corpus version, an index or a recipe")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DamagedError(f"{store.url}/{document_name(id)}: not a snapshot: {error}") from None
    return snapshot


def list_snapshots(store: Store) -> list[Snapshot]:
    """Return all snapshots of a store, the oldest first; also those that were never in service.

    Raises:
        StoreError: if the store cannot be read, or a snapshot is damaged.
    """
    return [load_snapshot(store, id) for id in snapshot_ids(store)]


def recipe_name(store: Store, snapshot: Snapshot) -> str:
    """Return the name of a snapshot's recipe, for people; empty if the store cannot say it."""
    try:
        recipe = store.get_sealed(f"adapters/{snapshot.recipe}/recipe.json", "recipe")["recipe"]
        return str(recipe["train"]["name"])
    except (StoreError, KeyError, TypeError):
        return ""


def forgotten_now(store: Store) -> set[str]:
    """Return the keys of the passages that are forgotten now: the tombstones of the snapshot in service.

    If no snapshot is in service, or it is damaged, these are the tombstones of all readable snapshots. If unsure,
    keep a passage forgotten.
    """
    try:
        if (serving := current_id(store)) is not None:
            return {*load_snapshot(store, serving).tombstones}
    except DamagedError:
        pass
    found: set[str] = set()
    for id in snapshot_ids(store):
        try:
            found.update(load_snapshot(store, id).tombstones)
        except DamagedError:
            continue
    return found


def put_candidate(store: Store, snapshot: Snapshot) -> None:
    """Store a snapshot that may never be in service. It can be opened by its id, published, or rolled back to.

    A mark beside it says so until it has been in service. Marked snapshots are not counted among those to keep.
    """
    store.put(candidate_mark(snapshot.id), b"")
    put_snapshot(store, snapshot)


def put_snapshot(store: Store, snapshot: Snapshot) -> None:
    """Store a snapshot without putting it into service."""
    store.put_json(document_name(snapshot.id), _document(snapshot))


def publish(store: Store, snapshot: Snapshot, *, replaces: str | None = ANY) -> bool:
    """Put a snapshot into service by one conditional write.

    Args:
        store: The store.
        snapshot: The snapshot.
        replaces: The id that was in service when the work on this snapshot began (None: there was none). With it, a
            publisher never replaces what another one published since. By default, replace any snapshot.

    Returns:
        False if the snapshot in service has the same content, so that nothing was written.

    Raises:
        ConflictError: if another publisher was faster. Its snapshot is in service. This one is stored, and can be
            put into service with `rollback`, or published again.
    """
    previous = store.get_if_exists(CURRENT)
    serving = parse_current(store, previous)
    if serving is not None and same_content(load_snapshot(store, serving), snapshot):
        return False
    put_snapshot(store, snapshot)
    if replaces not in (ANY, serving):
        raise _conflict(store, snapshot.id, serving)
    _move(store, previous, snapshot.id)
    return True


def rollback(store: Store, id: str) -> Snapshot:
    """Put a stored snapshot, older or newer, into service, and return the snapshot that is in service then.

    Forgotten passages stay forgotten: if the snapshot lacks some of the tombstones of `forgotten_now`, a new snapshot
    with them takes its place.

    Raises:
        StoreError: if there is no such snapshot.
        ConflictError: if somebody else published at the same time, or `prag gc` was removing this snapshot. The
            snapshot in service does not change then.
    """
    snapshot = load_snapshot(store, id)
    previous = store.get_if_exists(CURRENT)
    serving = parse_current(store, previous)
    if serving == id:
        return snapshot
    forgotten = forgotten_now(store)
    if not forgotten <= {*snapshot.tombstones}:
        snapshot = with_tombstones(snapshot, forgotten)
        put_snapshot(store, snapshot)
    _move(store, previous, snapshot.id)
    # `prag gc` removes the document first and reads CURRENT and PINS afterwards. Here it is the other way round, so
    # at least one of the two notices the other.
    if not store.exists(document_name(id)):
        if previous is not None:
            with contextlib.suppress(ConflictError):  # somebody has put another one into service by now
                store.swap(CURRENT, encode_current(snapshot.id), previous)
            if snapshot.id != id:
                store.remove(document_name(snapshot.id))
        raise collected_error(store, id)
    return snapshot


def with_id(snapshot: Snapshot) -> Snapshot:
    """Return a snapshot with the id that follows from its content and its time of creation."""
    content = {**_document(snapshot), "id": "", "created": ""}
    stamp = snapshot.created.replace("-", "").replace(":", "").split("+")[0]
    return replace(snapshot, id=f"{stamp}-{fingerprint(content)}")


def _document(snapshot: Snapshot) -> dict[str, Any]:
    # Thresholds are newer than the first snapshots: without them, the document and the id are as they were.
    document = asdict(snapshot)
    if snapshot.route is None:
        del document["route"]
    return document


def same_content(left: Snapshot, right: Snapshot) -> bool:
    """Return whether two snapshots are equal but for the time of creation."""
    return replace(left, id="", created="") == replace(right, id="", created="")


def candidate_mark(id: str) -> str:
    """Return the name of the empty object that marks a snapshot as a candidate."""
    return f"snapshots/{id}.candidate"


def parse_field(store: Store, name: str, data: bytes, field: str) -> Any:
    """Return one field of `CURRENT` or `PINS`.

    Raises:
        StoreError: if the object has no such field.
    """
    try:
        return parse_json(data.decode())[field]
    except (ValueError, TypeError, KeyError):
        raise DamagedError(f"{store.url}/{name}: has no field {field!r}") from None


def collected_error(store: Store, id: str) -> ConflictError:
    """Return the error for a snapshot that `prag gc` is removing."""
    return ConflictError(
        f"store = {store.url!r}: `prag gc` is removing the snapshot {id}", "choose another of `prag snapshots list`"
    )


def _move(store: Store, previous: bytes | None, id: str) -> None:
    try:
        store.swap(CURRENT, previous, encode_current(id))
    except ConflictError:
        raise _conflict(store, id, current_id(store)) from None
    store.remove(candidate_mark(id))


def _conflict(store: Store, id: str, serving: str | None) -> ConflictError:
    return ConflictError(
        f"store = {store.url!r}: another publisher put the snapshot {serving} into service meanwhile",
        f"nothing is lost, {id} is stored: check what is in service, and run `prag run` again to publish",
    )


def check_base_model(snapshot: Snapshot, store: Store, name: str, found: str) -> None:
    """Check that the base model `name`, whose fingerprint is `found`, is the one that a snapshot was made with.

    Raises:
        StoreError: if the snapshot was made with another one.
    """
    if found != snapshot.base_model:
        raise StoreError(
            f"store = {store.url!r} holds adapters for the base model {snapshot.base_model}; "
            f"model.name = {name!r} is {found}",
            "name the model that the store was made with, or another store for this model",
        )


def forgotten_keys(store: Store, snapshot: Snapshot) -> tuple[str, ...]:
    """Return the keys that must not be used when answering from a snapshot: its own tombstones and those of now."""
    return tuple(sorted({*snapshot.tombstones} | forgotten_now(store)))
