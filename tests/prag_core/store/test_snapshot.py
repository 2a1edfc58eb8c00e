"""Snapshots: publication is one conditional write, and no published snapshot is lost; on a folder and on S3."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from prag_core.errors import ConflictError, DamagedError, StoreError
from prag_core.identity import fingerprint
from prag_core.maintenance.garbage import find_garbage
from prag_core.records import Route
from prag_core.store.objects import Store
from prag_core.store.pins import kept_snapshots, pin, pinned, unpin
from prag_core.store.snapshot import (
    Snapshot,
    created_now,
    current_id,
    document_name,
    kept_route,
    list_snapshots,
    load_snapshot,
    publish,
    put_candidate,
    put_snapshot,
    rollback,
    with_id,
    with_ledger,
    with_route,
    with_tombstones,
)


def snapshot_of(*parts: str) -> Snapshot:
    return created_now(
        Snapshot(corpus_version="v", index="i", recipe="r", base_model="b", ledger_parts=parts, passages=2, adapters=1)
    )


def publish_dated(store: Store, count: int) -> list[str]:
    """Publish snapshots of as many days."""
    ids = []
    for day in range(count):
        dated = with_id(replace(snapshot_of(f"p{day}"), created=f"2026-01-{day + 1:02}T00:00:00+00:00"))
        publish(store, dated)
        ids.append(dated.id)
    return ids


def test_publishing_the_same_again_changes_nothing(store: Store) -> None:
    with pytest.raises(StoreError, match="nothing is published yet"):
        load_snapshot(store)
    first = snapshot_of("p1")
    assert publish(store, first)
    assert not publish(store, snapshot_of("p1"))
    assert load_snapshot(store) == first
    second = snapshot_of("p1", "p2")
    assert publish(store, second)
    assert current_id(store) == second.id
    assert load_snapshot(store, first.id) == first
    assert json.loads(store.get("CURRENT")) == {"snapshot": second.id}


def test_of_publishers_at_once_one_wins_and_none_loses_its_work(store: Store) -> None:
    base = snapshot_of("p")
    publish(store, base)
    rivals = [snapshot_of("p", f"q{n}") for n in range(6)]

    def run(snapshot: Snapshot) -> str:
        try:
            publish(store, snapshot, replaces=base.id)
        except ConflictError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(run, rivals))
    assert said.count("") == 1
    winner = rivals[said.index("")]
    assert load_snapshot(store) == winner
    lost = rivals[said.index("") - 1]
    message = said[said.index("") - 1]
    assert winner.id in message
    assert f"{lost.id} is stored" in message
    assert sorted(snapshot.id for snapshot in list_snapshots(store)) == sorted(s.id for s in [base, *rivals])
    rollback(store, lost.id)
    assert load_snapshot(store) == lost


def test_thresholds_are_part_of_a_snapshot_and_older_ones_have_none(store: Store) -> None:
    route = Route(closed_below=3.5, prag_score=7.0, prag_next=0.5, otherwise="rag")
    plain = snapshot_of("p1")
    publish(store, plain)
    # A snapshot without them is what it was before they were known: its document, and the id that depends on it.
    document = json.loads(store.get(document_name(plain.id)))
    assert "route" not in document
    assert plain.id.rpartition("-")[2] == fingerprint({**document, "id": "", "created": ""})
    fitted = with_route(plain, route)
    assert fitted.id.rpartition("-")[2] != plain.id.rpartition("-")[2]
    assert publish(store, fitted, replaces=plain.id)
    assert load_snapshot(store) == fitted
    assert kept_route(fitted, fitted.recipe) == route
    assert kept_route(fitted, "another") is kept_route(plain, plain.recipe) is kept_route(None, "r") is None
    # Whatever is published after it keeps them; a rollback to a snapshot without them does not.
    assert with_tombstones(fitted, ["a"]).route == with_ledger(fitted, ["p2"], 1).route == route
    publish(store, with_tombstones(fitted, ["a"]))
    assert rollback(store, fitted.id).route == route
    assert rollback(store, plain.id).route is None


@pytest.mark.parametrize("wrong", [{"prag_next": 7.0}, {"prag_next": "0.5"}, {"otherwise": "closed"}])
def test_damaged_thresholds_are_damage(store: Store, wrong: dict) -> None:
    route = Route(closed_below=3.5, prag_score=7.0, prag_next=0.5, otherwise="rag")
    snapshot = with_route(snapshot_of("p1"), route)
    publish(store, snapshot)
    document = json.loads(store.get(document_name(snapshot.id)))
    document["route"] |= wrong
    store.put_json(document_name(snapshot.id), document)
    with pytest.raises(StoreError, match="not a snapshot"):
        load_snapshot(store)


def test_the_first_publication_is_a_race_too(store: Store) -> None:
    publish(store, snapshot_of("p1"), replaces=None)
    with pytest.raises(ConflictError, match="another publisher"):
        publish(store, snapshot_of("p2"), replaces=None)


def test_rolling_back_and_forth(store: Store) -> None:
    first, second, third = publish_dated(store, 3)
    assert [snapshot.id for snapshot in list_snapshots(store)] == [first, second, third]
    assert rollback(store, first).id == first
    assert current_id(store) == first
    rollback(store, first)
    rollback(store, third)
    assert current_id(store) == third
    with pytest.raises(StoreError, match=r"snapshots/none\.json: no such object"):
        rollback(store, "none")
    assert current_id(store) == third


def test_the_newest_the_pinned_and_the_one_in_service_are_kept(store: Store) -> None:
    ids = publish_dated(store, 6)
    assert kept_snapshots(store, 2) == ids[4:]
    pin(store, ids[1])
    pin(store, ids[1])
    rollback(store, ids[0])
    assert pinned(store) == (ids[1],)
    assert kept_snapshots(store, 2) == [ids[0], ids[1], *ids[4:]]
    assert kept_snapshots(store, 100) == ids
    unpin(store, ids[1])
    assert kept_snapshots(store, 1) == [ids[0], ids[5]]
    with pytest.raises(StoreError, match="is not pinned"):
        unpin(store, ids[1])
    with pytest.raises(StoreError, match="no such object"):
        pin(store, "none")


def test_candidates_that_never_served_push_nothing_out(store: Store) -> None:
    ids = publish_dated(store, 3)
    failed = [with_id(replace(snapshot_of(f"c{n}"), created=f"2099-01-0{n + 1}T00:00:00+00:00")) for n in range(3)]
    for candidate in failed:
        put_candidate(store, candidate)
    assert kept_snapshots(store, 2) == [*ids[1:], failed[2].id]
    # One that was put into service after all is one like the others.
    rollback(store, failed[1].id)
    rollback(store, ids[2])
    assert kept_snapshots(store, 2) == [ids[2], failed[1].id, failed[2].id]
    assert store.list("snapshots", ".candidate") == [f"snapshots/{failed[n].id}.candidate" for n in (0, 2)]


def test_the_mark_of_a_candidate_is_removed_with_it(store: Store) -> None:
    publish(store, snapshot_of("p1"))
    first, second = snapshot_of("c1"), snapshot_of("c2")
    for candidate in (first, second):
        put_candidate(store, candidate)
    publish(store, snapshot_of("p2"))
    garbage = find_garbage(store, store.objects(), kept_snapshots(store, 2), grace_s=-60)
    assert [found.name for found in garbage.objects] == [
        f"snapshots/{first.id}{end}" for end in (".json", ".candidate")
    ]


def test_pins_at_once_are_all_kept(store: Store) -> None:
    ids = publish_dated(store, 5)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda id: pin(store, id), ids))
    assert pinned(store) == tuple(ids)


def test_tombstones_add_up_and_make_another_snapshot(store: Store) -> None:
    plain = snapshot_of("p1")
    once = with_tombstones(plain, ["b", "a"])
    twice = with_tombstones(once, ["c", "a"])
    assert (once.tombstones, twice.tombstones) == (("a", "b"), ("a", "b", "c"))
    assert len({plain.id, once.id, twice.id}) == 3
    publish(store, plain)
    assert publish(store, twice)
    assert load_snapshot(store) == twice


@pytest.mark.parametrize("value", [5, None, ["a"]])
def test_what_is_no_id_is_named(store: Store, value: object) -> None:
    store.put_json("CURRENT", {"snapshot": value})
    with pytest.raises(StoreError, match=r"CURRENT: .* is no snapshot's id"):
        current_id(store)


@pytest.mark.parametrize("value", [5, None, "abc", [1], [None, "a"]])
def test_what_are_no_pins_is_named(store: Store, value: object) -> None:
    store.put_json("PINS", {"pinned": value})
    with pytest.raises(StoreError, match=r"PINS: .* is no list of snapshots' ids"):
        pinned(store)


@pytest.mark.parametrize("text", ["[]", "not json", '{"other": 1}', "[" * 100_000])
def test_damaged_documents_are_named(store: Store, text: str) -> None:
    (id,) = publish_dated(store, 1)
    store.put(document_name(id), text.encode())
    with pytest.raises(StoreError, match=rf"snapshots/{id}\.json: not (a snapshot|JSON)"):
        load_snapshot(store)
    store.put("CURRENT", text.encode())
    with pytest.raises(StoreError, match="CURRENT: has no field 'snapshot'"):
        load_snapshot(store)


@pytest.mark.parametrize(
    ("field", "value"),
    [("tombstones", []), ("tombstones", ["a", "c"]), ("ledger_parts", ["p2"]), ("created", "2026-01-02"), ("more", 1)],
)
def test_an_altered_snapshot_is_refused(store: Store, field: str, value: object) -> None:
    """Least of all may a passage be taken off the list of what was forgotten."""
    snapshot = with_tombstones(snapshot_of("p1"), ["a", "b"])
    publish(store, snapshot)
    store.put_json(document_name(snapshot.id), {**store.get_json(document_name(snapshot.id)), field: value})
    with pytest.raises(StoreError, match=rf"snapshots/{snapshot.id}\.json: not a snapshot"):
        load_snapshot(store)


@pytest.mark.parametrize("name", ["../../cache", "/etc", "..", ""])
def test_a_snapshot_names_no_folder_elsewhere(store: Store, name: str) -> None:
    """The id of an index is a folder of the local cache of each server, which would be written and removed."""
    for field in ("corpus_version", "index", "recipe"):
        snapshot = created_now(replace(snapshot_of("p1"), **{field: name}))
        put_snapshot(store, snapshot)
        with pytest.raises(DamagedError, match="is no name of a corpus version, an index or a recipe"):
            load_snapshot(store, snapshot.id)


def test_current_names_no_document_elsewhere(store: Store) -> None:
    store.put_json("CURRENT", {"snapshot": "../../private"})
    with pytest.raises(DamagedError, match="is no name of an object"):
        load_snapshot(store)
