"""Snapshots: one immutable document names all that an answer needs; `CURRENT` names the one in service."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from prag_core.errors import StoreError
from prag_core.identity import fingerprint
from prag_core.store import Store

CURRENT = "CURRENT"


@dataclass(frozen=True)
class Snapshot:
    """One corpus version, one Lucene index, the ledger parts of one recipe, in full.

    `tombstones` are the keys of passages that must not be used any more. `id` is content-derived but for the
    time of creation.
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
) -> Snapshot:
    """Return a snapshot of these parts, with an id and the time of now."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    content = [corpus_version, index, recipe, base_model, ledger_parts, passages, adapters]
    stamp = created.replace("-", "").replace(":", "").split("+")[0]
    return Snapshot(
        id=f"{stamp}-{fingerprint(content)}",
        created=created,
        corpus_version=corpus_version,
        index=index,
        recipe=recipe,
        base_model=base_model,
        ledger_parts=ledger_parts,
        passages=passages,
        adapters=adapters,
    )


def current_id(store: Store) -> str | None:
    """Return the id of the snapshot in service, or None before the first publication."""
    if not store.exists(CURRENT):
        return None
    return str(json.loads(store.get(CURRENT))["snapshot"])


def load_snapshot(store: Store, id: str | None = None) -> Snapshot:
    """Return a snapshot, by default the one in service.

    Raises:
        StoreError: when nothing was published yet, or there is no such snapshot.
    """
    id = id or current_id(store)
    if id is None:
        raise StoreError(f"store = {store.url!r}: nothing is published yet", "run `prag run` first")
    document: dict[str, Any] = store.get_json(f"snapshots/{id}.json")
    return Snapshot(
        **{
            **document,
            "ledger_parts": tuple(document["ledger_parts"]),
            "tombstones": tuple(document["tombstones"]),
        }
    )


def publish(store: Store, snapshot: Snapshot) -> bool:
    """Put a snapshot into service by one conditional write; returns False when the one in service says the same.

    Raises:
        ConflictError: when another publisher was faster; its snapshot stays, this one can be published again.
    """
    previous = store.get(CURRENT) if store.exists(CURRENT) else None
    if previous is not None:
        serving = load_snapshot(store, str(json.loads(previous)["snapshot"]))
        if {**asdict(serving), "id": "", "created": ""} == {**asdict(snapshot), "id": "", "created": ""}:
            return False
    store.put_json(f"snapshots/{snapshot.id}.json", asdict(snapshot))
    store.swap(CURRENT, previous, json.dumps({"snapshot": snapshot.id}).encode())
    return True
