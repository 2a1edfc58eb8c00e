"""Snapshots: one immutable document names all that an answer needs; `CURRENT` names the one in service.

`PINS` names the snapshots that are kept whatever their age. Both move by conditional writes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from prag_core.errors import ConflictError, StoreError, UnreachableError
from prag_core.identity import fingerprint
from prag_core.store.objects import Store

CURRENT = "CURRENT"
PINS = "PINS"
ANY = "*"
PIN_TRIES = 20


@dataclass(frozen=True)
class Snapshot:
    """One corpus version, one Lucene index, the ledger parts of one recipe, in full.

    `tombstones` are the keys of passages that must not be used any more. `id` is content-derived but for the
    time of creation, with which it begins: in the order of ids, the newest is the last.
    """

    id: str
    created: str
    corpus_version: str
    index: str
    recipe: str
    base_model: str
    ledger_parts: tuple[str, ...]
    passages: int
    adapters: int
    tombstones: tuple[str, ...] = ()


def make_snapshot(
    *,
    corpus_version: str,
    index: str,
    recipe: str,
    base_model: str,
    ledger_parts: tuple[str, ...],
    passages: int,
    adapters: int,
    tombstones: tuple[str, ...] = (),
) -> Snapshot:
    """Return a snapshot of these parts, with an id and the time of now."""
    return _stamped(
        Snapshot(
            id="",
            created="",
            corpus_version=corpus_version,
            index=index,
            recipe=recipe,
            base_model=base_model,
            ledger_parts=ledger_parts,
            passages=passages,
            adapters=adapters,
            tombstones=tombstones,
        )
    )


def with_tombstones(snapshot: Snapshot, keys: Iterable[str]) -> Snapshot:
    """Return a new snapshot in which the passages of these keys must not be used any more, besides those before."""
    return _stamped(replace(snapshot, tombstones=tuple(sorted({*snapshot.tombstones, *keys}))))


def without_tombstones(snapshot: Snapshot, keys: Iterable[str]) -> Snapshot:
    """Return a new snapshot in which the passages of these keys may be used again."""
    return _stamped(replace(snapshot, tombstones=tuple(sorted({*snapshot.tombstones} - {*keys}))))


def with_ledger(snapshot: Snapshot, parts: Iterable[str], adapters: int) -> Snapshot:
    """Return a new snapshot that names other ledger parts, which hold so many adapters."""
    return _stamped(replace(snapshot, ledger_parts=tuple(sorted(parts)), adapters=adapters))


def current_id(store: Store) -> str | None:
    """Return the id of the snapshot in service, or None before the first publication.

    Raises:
        StoreError: when `CURRENT` cannot be read or names nothing.
    """
    return _named_in(store, store.get_if_exists(CURRENT))


def load_snapshot(store: Store, id: str | None = None) -> Snapshot:
    """Return a snapshot, by default the one in service, after checking that it says what its id was made from.

    Raises:
        StoreError: when nothing was published yet, or there is no such snapshot, or it is damaged.
    """
    id = id or current_id(store)
    if id is None:
        raise StoreError(f"store = {store.url!r}: nothing is published yet", "run `prag run` first")
    document = store.get_json(_document(id))
    try:
        lists = {field: tuple(document[field]) for field in ("ledger_parts", "tombstones")}
        snapshot = Snapshot(**{**document, **lists})
        if snapshot.id != id or renamed(snapshot).id != id:
            raise ValueError("its content is not what its id was made from")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise StoreError(f"{store.url}/{_document(id)}: not a snapshot: {error}", "run `prag repair`") from None
    return snapshot


def list_snapshots(store: Store) -> list[Snapshot]:
    """Return all snapshots of a store, the oldest first; also those that were written but never in service.

    Raises:
        StoreError: when the store cannot be read, or one of them is damaged.
    """
    return [load_snapshot(store, id) for id in _ids(store)]


def forgotten_now(store: Store) -> set[str]:
    """Return the keys of passages that must not be used now: the tombstones of the snapshot in service.

    Where none is in service, or it is damaged, those of all snapshots that can be read: rather may a passage be
    forgotten again whose forgetting was undone than one come back.

    Raises:
        UnreachableError: when the store cannot be asked.
    """
    try:
        if (serving := current_id(store)) is not None:
            return {*load_snapshot(store, serving).tombstones}
    except UnreachableError:
        raise
    except StoreError:
        pass
    found: set[str] = set()
    for id in _ids(store):
        try:
            found.update(load_snapshot(store, id).tombstones)
        except UnreachableError:
            raise
        except StoreError:
            continue
    return found


def put_candidate(store: Store, snapshot: Snapshot) -> None:
    """Store a snapshot without putting it into service: it can be asked, published, or served by `rollback`.

    Until it has been in service nobody would go back to it: it takes no place among those that are kept.
    """
    store.put(_mark(snapshot.id), b"")
    put_snapshot(store, snapshot)


def put_snapshot(store: Store, snapshot: Snapshot) -> None:
    """Store a snapshot without putting it into service; see `put_candidate` for one that may never be."""
    store.put_json(_document(snapshot.id), asdict(snapshot))


def publish(store: Store, snapshot: Snapshot, *, replaces: str | None = ANY) -> bool:
    """Put a snapshot into service by one conditional write; returns False when the one in service says the same.

    Args:
        store: Where.
        snapshot: Which.
        replaces: The id that was in service when the work on this snapshot began (None: none was). A publisher
            that gives it never covers what another one published since. By default, whatever is in service now.

    Raises:
        ConflictError: when another publisher was faster. Its snapshot is in service; this one lies in the store
            and can be put into service with `rollback`, or published again.
    """
    previous = store.get_if_exists(CURRENT)
    serving = _named_in(store, previous)
    if serving is not None and same_content(load_snapshot(store, serving), snapshot):
        return False
    put_snapshot(store, snapshot)
    if replaces not in (ANY, serving):
        raise _conflict(store, snapshot.id, serving)
    _move(store, previous, snapshot.id)
    return True


def rollback(store: Store, id: str) -> Snapshot:
    """Put an existing snapshot, older or newer, into service, and return what serves then.

    What was forgotten since stays forgotten: where the snapshot lacks tombstones of the one in service (or, when
    that is damaged, of any), a new one with them takes its place.

    Raises:
        StoreError: when there is no such snapshot.
        ConflictError: when somebody else changed the one in service at the same time, or a collection of garbage
            was taking this snapshot away; then what served before serves on.
    """
    snapshot = load_snapshot(store, id)
    previous = store.get_if_exists(CURRENT)
    serving = _named_in(store, previous)
    if serving == id:
        return snapshot
    forgotten = forgotten_now(store)
    if not forgotten <= {*snapshot.tombstones}:
        snapshot = with_tombstones(snapshot, forgotten)
        put_snapshot(store, snapshot)
    _move(store, previous, snapshot.id)
    # A collection removes a document and then looks at CURRENT and PINS: one of the two sees the other.
    if not store.exists(_document(id)):
        if previous is not None:
            with contextlib.suppress(ConflictError):  # somebody has put another one into service by now
                store.swap(CURRENT, _naming(snapshot.id), previous)
            if snapshot.id != id:
                store.remove(_document(snapshot.id))
        raise _collected(store, id)
    return snapshot


def pinned(store: Store) -> tuple[str, ...]:
    """Return the ids of the pinned snapshots, sorted.

    Raises:
        StoreError: when they cannot be read.
    """
    return _pins_in(store, store.get_if_exists(PINS))


def pin(store: Store, id: str) -> None:
    """Keep a snapshot whatever its age; one that is pinned already stays so.

    Raises:
        StoreError: when there is no such snapshot.
        ConflictError: when others changed the pins again and again meanwhile, or a collection of garbage was taking
            this snapshot away.
    """
    load_snapshot(store, id)
    _change_pins(store, lambda pins: pins | {id})
    if not store.exists(_document(id)):  # as in `rollback`
        _change_pins(store, lambda pins: pins - {id})
        raise _collected(store, id)


def unpin(store: Store, id: str) -> None:
    """Let a snapshot go with its age again.

    Raises:
        StoreError: when it is not pinned.
        ConflictError: when others changed the pins again and again meanwhile.
    """

    def without(pins: frozenset[str]) -> frozenset[str]:
        if id not in pins:
            raise StoreError(f"store = {store.url!r}: the snapshot {id} is not pinned", "look for its id in PINS")
        return pins - {id}

    _change_pins(store, without)


def move_pins(store: Store, successors: Mapping[str, str | None]) -> None:
    """Pin, instead of each pinned snapshot, the one that took its place; those without one are pinned no more.

    A list of pins that is damaged is given up.

    Raises:
        ConflictError: when somebody changed the pins meanwhile.
    """
    before = store.get_if_exists(PINS)
    try:
        pins = _pins_in(store, before)
    except (StoreError, TypeError):
        pins = ()
    after = json.dumps({"pinned": sorted({new for id in pins if (new := successors.get(id))})}).encode()
    if before is not None and before != after:
        store.swap(PINS, before, after)


def kept_snapshots(store: Store, newest: int) -> list[str]:
    """Return the ids to keep, the oldest first: the `newest` so many, the pinned ones and the one in service.

    Candidates that never were in service do not count, and only the newest of them is kept.

    Raises:
        StoreError: when the store cannot be read.
    """
    marks = {*store.list("snapshots", ".candidate")}
    candidates = [id for id in _ids(store) if _mark(id) in marks]
    ids = [id for id in _ids(store) if _mark(id) not in marks]
    newest_ids = [*ids[max(0, len(ids) - newest) :], *candidates[-1:]]
    return sorted({*newest_ids, *pinned(store), *filter(None, [current_id(store)])})


def renamed(snapshot: Snapshot) -> Snapshot:
    """Return a snapshot with the id that its content and its time of creation ask for."""
    content = {**asdict(snapshot), "id": "", "created": ""}
    stamp = snapshot.created.replace("-", "").replace(":", "").split("+")[0]
    return replace(snapshot, id=f"{stamp}-{fingerprint(content)}")


def _stamped(snapshot: Snapshot) -> Snapshot:
    return renamed(replace(snapshot, created=datetime.now(UTC).isoformat(timespec="microseconds")))


def same_content(left: Snapshot, right: Snapshot) -> bool:
    """Whether two snapshots say the same, whenever they were made."""
    return replace(left, id="", created="") == replace(right, id="", created="")


def _document(id: str) -> str:
    return f"snapshots/{id}.json"


def _mark(id: str) -> str:
    return f"snapshots/{id}.candidate"


def _ids(store: Store) -> list[str]:
    return [name.removeprefix("snapshots/").removesuffix(".json") for name in store.list("snapshots", ".json")]


def _named_in(store: Store, current: bytes | None) -> str | None:
    return None if current is None else str(_field(store, CURRENT, current, "snapshot"))


def _pins_in(store: Store, pins: bytes | None) -> tuple[str, ...]:
    return () if pins is None else tuple(_field(store, PINS, pins, "pinned"))


def _field(store: Store, name: str, data: bytes, field: str) -> Any:
    try:
        return json.loads(data)[field]
    except (ValueError, TypeError, KeyError):
        raise StoreError(f"{store.url}/{name}: does not say {field!r}", "it was written by hand: mend it") from None


def _naming(id: str) -> bytes:
    return json.dumps({"snapshot": id}).encode()


def _collected(store: Store, id: str) -> ConflictError:
    return ConflictError(
        f"store = {store.url!r}: `prag gc` is taking the snapshot {id} away", "choose another of `prag snapshots list`"
    )


def _move(store: Store, previous: bytes | None, id: str) -> None:
    try:
        store.swap(CURRENT, previous, _naming(id))
    except ConflictError:
        raise _conflict(store, id, current_id(store)) from None
    if store.exists(_mark(id)):
        store.remove(_mark(id))


def _conflict(store: Store, id: str, serving: str | None) -> ConflictError:
    return ConflictError(
        f"store = {store.url!r}: another publisher put the snapshot {serving} into service meanwhile",
        f"nothing is lost, {id} is stored: look at what is in service, and run `prag run` again to publish",
    )


def _change_pins(store: Store, change: Callable[[frozenset[str]], frozenset[str]]) -> None:
    for attempt in range(PIN_TRIES):
        before = store.get_if_exists(PINS)
        pins = frozenset(_pins_in(store, before))
        after = change(pins)
        if after == pins:
            return
        try:
            store.swap(PINS, before, json.dumps({"pinned": sorted(after)}).encode())
            return
        except ConflictError:  # another pin came between: it must not be lost, nor this one
            if attempt == PIN_TRIES - 1:
                raise


def check_base_model(snapshot: Snapshot, store: Store, name: str, found: str) -> None:
    """Check that the base model `name`, whose fingerprint is `found`, is the snapshot's.

    Raises:
        StoreError: when the snapshot was made with another one.
    """
    if found != snapshot.base_model:
        raise StoreError(
            f"store = {store.url!r} holds adapters for the base model {snapshot.base_model}; "
            f"model.name = {name!r} is {found}",
            "name the model that the store was made with, or another store for this model",
        )


def forgotten_keys(store: Store, snapshot: Snapshot) -> tuple[str, ...]:
    """Return the keys that must not be used when answering from a snapshot: its own tombstones and later ones.

    Raises:
        UnreachableError: when the store cannot be asked.
    """
    return tuple(sorted({*snapshot.tombstones} | forgotten_now(store)))
