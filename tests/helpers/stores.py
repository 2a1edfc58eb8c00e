"""A small store with everything in it, and what must hold of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa
import torch

from prag_core.config import AugmentConfig, TrainConfig, augment_recipe, train_recipe
from prag_core.errors import AdapterError
from prag_core.identity import checksum, seal
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import TrainedAdapter
from prag_core.maintenance.inventory import Finding, check_snapshots, object_kind, serving_id
from prag_core.maintenance.verify import (
    ROWS,
    check_object,
    check_pins_and_lease,
    check_references,
    check_shards,
    is_checkable,
    ledger_rows,
)
from prag_core.recipe import Recipe
from prag_core.records import LedgerRow, Passage, Reject, to_table
from prag_core.retrieval.archive import StoredIndex
from prag_core.store.adapters import AdapterStore, LedgerSource, open_adapters
from prag_core.store.objects import Store
from prag_core.store.snapshot import Snapshot, created_now, current_id, load_snapshot, publish
from prag_core.store.tables import put_augmentations, put_rejects
from tests.helpers.adapters import random_adapter
from tests.helpers.passages import make_augmentation, make_passage

TRAIN = train_recipe(TrainConfig())
RECIPE = Recipe("base", augment_recipe(AugmentConfig(), "generator", TRAIN), TRAIN)
PASSAGES = [make_passage(n) for n in range(12)]
SEEDS = {passage.key: number for number, passage in enumerate(PASSAGES)}
VERSION, INDEX = "c0ffee", "1d"


def verify(store: Store, full: bool = True) -> list[Finding]:
    """All checks in one process, in the order in which the pipeline does them on Ray."""
    objects = [item.name for item in store.objects()]
    snapshots, findings = check_snapshots(store)
    findings += check_references(objects, snapshots, serving_id(store)) + check_pins_and_lease(store, snapshots)
    for name in filter(is_checkable, objects):
        findings += check_object(store, name, full)
    broken = {finding.name for finding in findings}
    parts = [name for name in objects if object_kind(name) == "ledger" and name not in broken]
    tables = [ledger_rows(store, part) for part in parts]
    return findings + check_shards(store, pa.concat_tables([ROWS.empty_table(), *tables]), full)


def adapters_of(store: Store, layout: LoraLayout, recipe: Recipe = RECIPE) -> AdapterStore:
    return AdapterStore(store, recipe, layout, "float32")


def commit(adapters: AdapterStore, keys: Sequence[str], digest: str = "d", seed: int = 0) -> list[LedgerRow]:
    made = [
        TrainedAdapter(key, random_adapter(adapters.layout, SEEDS[key] + seed), 20, 500, 3.0, 0.5, 1.5) for key in keys
    ]
    return adapters.commit([(adapter, digest) for adapter in made])


def write_corpus(store: Store, version: str, passages: Sequence[Passage]) -> None:
    half = len(passages) // 2
    parts = [store.put_table(f"corpus/{version}", to_table(Passage, p)) for p in (passages[:half], passages[half:])]
    store.put_json(f"corpus/{version}/manifest.json", seal({"passages": len(passages), "parts": parts, "report": {}}))


def write_index(store: Store, index: str, version: str) -> None:
    archive = f"archive of {index} ".encode() * 40
    store.put(f"indexes/{index}/lucene.tar.zst", archive)
    record = StoredIndex(index, version, len(PASSAGES), len(archive), checksum(archive), "1")
    store.put_json(f"indexes/{index}/index.json", seal(asdict(record)))


def snapshot_now(store: Store, adapters: AdapterStore, version: str = VERSION, index: str = INDEX) -> str:
    publish(
        store,
        created_now(
            Snapshot(
                corpus_version=version,
                index=index,
                recipe=adapters.recipe.fingerprint,
                base_model="base",
                ledger_parts=tuple(adapters.ledger_parts()),
                passages=len(PASSAGES),
                adapters=len(PASSAGES),
            )
        ),
    )
    return str(current_id(store))


def run_again(store: Store, layout: LoraLayout) -> None:
    """What a run does with a store: makes what is missing, and publishes."""
    adapters = adapters_of(store, layout)
    adapters.describe()
    if not store.exists(f"corpus/{VERSION}/manifest.json"):
        write_corpus(store, VERSION, PASSAGES)
    for passage in PASSAGES:
        put_augmentations(store, RECIPE.augment.fingerprint, [make_augmentation(passage)])
    there = set(store.get_table(LedgerRow, adapters.ledger_parts(), ["key"])["key"].to_pylist())
    missing = [passage.key for passage in PASSAGES if passage.key not in there]
    for begin in range(0, len(missing), 3):
        commit(adapters, missing[begin : begin + 3])
    if not store.exists(f"indexes/{INDEX}/index.json"):
        write_index(store, INDEX, VERSION)
    put_rejects(store, "run0", [Reject("augment", "no_pairs", "", "p99", "k99")])
    snapshot_now(store, adapters)


def served(store: Store) -> dict[str, dict[str, torch.Tensor]]:
    """What an engine could use of the snapshot in service: the adapters that come through its checks."""
    snapshot = load_snapshot(store)
    source = LedgerSource(open_adapters(store, snapshot.recipe)[0], snapshot.ledger_parts)
    found = {}
    for key in SEEDS:
        try:
            found[key] = source.get(key)
        except AdapterError:
            continue
    return found


def all_snapshots(store: Store) -> set[str]:
    return {snapshot.id for snapshot in check_snapshots(store)[0]}


def is_trained(layout: LoraLayout, key: str, factors: dict[str, torch.Tensor], seed: int = 0) -> bool:
    expected = random_adapter(layout, SEEDS[key] + seed)
    return all(torch.equal(factors[name], expected[name]) for name in expected)
