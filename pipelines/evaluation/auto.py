"""Fits the thresholds of `auto` to an evaluation, and stores them in a snapshot."""

from __future__ import annotations

from prag_core.evaluation.auto import AutoFit, fit, observe
from prag_core.evaluation.summary import Evaluation
from prag_core.records import Route
from prag_core.store.ledger import LedgerColumns
from prag_core.store.objects import Store
from prag_core.store.snapshot import Snapshot, current_id, load_snapshot, publish, put_candidate, with_route


def fit_auto(store: Store, evaluation: Evaluation) -> AutoFit:
    """Fit the thresholds of `auto` to an evaluation of a snapshot of this store; see `fit`.

    Raises:
        InputError: see `fit`.
        StoreError: when the snapshot or its ledger cannot be read.
    """
    ledger = LedgerColumns(store, _evaluated(store, evaluation).ledger_parts)
    return fit(observe(evaluation, lambda key: ledger.find(key) is not None))


def store_route(store: Store, evaluation: Evaluation, route: Route) -> tuple[str, bool]:
    """Store the evaluated snapshot with these thresholds; return the id, and whether it is in service.

    It is put into service if the evaluated snapshot is. Otherwise it is stored as a candidate.

    Raises:
        ConflictError: when somebody publishes at the same time; the new snapshot is stored.
    """
    old = _evaluated(store, evaluation)
    if old.route == route:
        return old.id, current_id(store) == old.id
    new = with_route(old, route)
    if current_id(store) != old.id:
        put_candidate(store, new)
        return new.id, False
    publish(store, new, replaces=old.id)
    return new.id, True


def _evaluated(store: Store, evaluation: Evaluation) -> Snapshot:
    return load_snapshot(store, evaluation.origin["snapshot"]["id"])
