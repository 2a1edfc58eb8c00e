"""Pins: `PINS` names the snapshots that are kept whatever their age. It changes by conditional writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping

from prag_core.errors import ConflictError, DamagedError, StoreError
from prag_core.store.objects import Store
from prag_core.store.snapshot import (
    candidate_mark,
    collected_error,
    current_id,
    document_name,
    load_snapshot,
    parse_field,
    snapshot_ids,
)

PINS = "PINS"
_TRIES = 20


def pinned(store: Store) -> tuple[str, ...]:
    """Return the ids of the pinned snapshots, sorted.

    Raises:
        StoreError: if `PINS` cannot be read, or is damaged.
    """
    return _parse_pins(store, store.get_if_exists(PINS))


def pin(store: Store, id: str) -> None:
    """Keep a snapshot whatever its age.

    Raises:
        StoreError: if there is no such snapshot.
        ConflictError: if others changed the pins again and again meanwhile, or `prag gc` was removing this snapshot.
    """
    load_snapshot(store, id)
    _change_pins(store, lambda pins: pins | {id})
    if not store.exists(document_name(id)):  # see `rollback`
        _change_pins(store, lambda pins: pins - {id})
        raise collected_error(store, id)


def unpin(store: Store, id: str) -> None:
    """Remove the pin of a snapshot, so that `prag gc` may remove the snapshot when it is old.

    Raises:
        StoreError: if it is not pinned.
        ConflictError: if others changed the pins again and again meanwhile.
    """

    def without(pins: frozenset[str]) -> frozenset[str]:
        if id not in pins:
            raise StoreError(f"store = {store.url!r}: the snapshot {id} is not pinned", "see `prag snapshots list`")
        return pins - {id}

    _change_pins(store, without)


def move_pins(store: Store, successors: Mapping[str, str | None]) -> None:
    """Pin the successor of each pinned snapshot instead of it. A snapshot without a successor loses its pin.

    If `PINS` is damaged, all pins are lost.

    Raises:
        ConflictError: if somebody changed the pins meanwhile.
    """
    before = store.get_if_exists(PINS)
    try:
        pins = _parse_pins(store, before)
    except DamagedError:
        pins = ()
    after = _encode_pins({new for id in pins if (new := successors.get(id))})
    if before is not None and before != after:
        store.swap(PINS, before, after)


def kept_snapshots(store: Store, newest: int) -> list[str]:
    """Return the ids of the snapshots to keep, the oldest first.

    These are the last `newest` snapshots that have been in service, the newest candidate, the pinned snapshots, and
    the one in service.
    """
    marks = {*store.list("snapshots", ".candidate")}
    candidates = [id for id in snapshot_ids(store) if candidate_mark(id) in marks]
    ids = [id for id in snapshot_ids(store) if candidate_mark(id) not in marks]
    newest_ids = [*ids[max(0, len(ids) - newest) :], *candidates[-1:]]
    return sorted({*newest_ids, *pinned(store), *filter(None, [current_id(store)])})


def _encode_pins(pins: Collection[str]) -> bytes:
    return json.dumps({"pinned": sorted(pins)}).encode()


def _parse_pins(store: Store, pins: bytes | None) -> tuple[str, ...]:
    if pins is None:
        return ()
    ids = parse_field(store, PINS, pins, "pinned")
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
        raise DamagedError(f"{store.url}/{PINS}: {ids!r} is no list of snapshots' ids")
    return tuple(ids)


def _change_pins(store: Store, change: Callable[[frozenset[str]], frozenset[str]]) -> None:
    for attempt in range(_TRIES):
        before = store.get_if_exists(PINS)
        pins = frozenset(_parse_pins(store, before))
        after = change(pins)
        if after == pins:
            return
        try:
            store.swap(PINS, before, _encode_pins(after))
            return
        except ConflictError:  # another pin was written meanwhile: keep both
            if attempt == _TRIES - 1:
                raise
