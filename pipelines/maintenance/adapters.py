"""Export of one passage's adapter to a PEFT folder, and import from one."""

from __future__ import annotations

from pathlib import Path

from prag_core.config import Config
from prag_core.errors import InputError
from prag_core.records import LedgerRow, to_table
from prag_core.store.objects import Store, open_store
from prag_core.store.runs import hold_lease, new_run_id
from prag_core.store.snapshot import check_base_model, load_snapshot, publish, with_ledger
from prag_core.store.tables import find_passages


def one_key(store: Store, corpus_version: str, name: str) -> str:
    """Return the key of the one passage with this key or source id.

    Raises:
        InputError: if there is none, or the source's text was cut into several passages.
    """
    passages = find_passages(store, corpus_version, [name])
    if len(passages) > 1:
        keys = ", ".join(passage.key for passage in passages[:5])
        raise InputError(f"the id {name!r} has {len(passages)} passages", f"give a key: {keys}")
    return passages[0].key if passages else name


def export(config: Config, name: str, folder: Path, snapshot_id: str | None) -> str:
    """Write a passage's adapter as a PEFT folder with a card (README.md), and return the passage's key.

    `name` is the passage's key or a source id, `snapshot_id` the snapshot to use (None: the one in service).

    Raises:
        InputError: if there is no such passage, it was forgotten, or the folder is not empty.
        AdapterError: if the passage has no adapter, or it is damaged.
        ModelError: if the configured base model cannot be found.
        StoreError: if the store was made with another base model.
    """
    from prag_core.llm.adapter_card import AdapterCard, write_card
    from prag_core.llm.peft import export_peft, peft_base
    from prag_core.store.adapters import find_row, open_adapters

    store = open_store(config)
    snapshot = load_snapshot(store, snapshot_id)
    key = one_key(store, snapshot.corpus_version, name)
    if key in load_snapshot(store).tombstones:
        raise InputError(f"{name}: was forgotten", "see `prag forget --help`")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not an empty folder", "name another with --to")
    adapters, _ = open_adapters(store, snapshot.recipe)
    row = find_row(store, snapshot.ledger_parts, key)
    factors = adapters.fetch(row)
    base = peft_base(config.model.name)
    check_base_model(snapshot, store, config.model.name, base.facts.fingerprint)
    export_peft(adapters.layout, factors, folder, base)
    # An adapter may outlive its passage's place in the corpus.
    passages = find_passages(store, snapshot.corpus_version, [key])
    title, sources = (passages[0].title, passages[0].sources) if passages else ("", ())
    training = (row.steps, row.tokens, row.first_loss, row.last_loss, row.seconds)
    write_card(folder, base, AdapterCard(adapters.recipe, key, title, sources, *training))
    return key


def import_adapter(config: Config, name: str, folder: Path, take_over: bool) -> tuple[str, str]:
    """Publish the adapter of a PEFT folder as a passage's adapter; return the passage's key and the snapshot's id.

    It replaces the trained adapter until the passage's augmentation changes.

    Raises:
        InputError: if the corpus in service has no such passage, or no run has augmented it.
        AdapterError: if the folder holds no plain LoRA adapter of the recipe's shape and base model.
        ModelError: if the configured base model cannot be found.
        StoreError: if the store was made with another base model.
        LeaseError: if a run works on the store.
    """
    from prag_core.llm.lora import TrainedAdapter
    from prag_core.llm.peft import import_peft, peft_base
    from prag_core.store.adapters import AdapterStore, open_adapters

    store = open_store(config)
    with hold_lease(store, new_run_id("import"), take_over=take_over):
        snapshot = load_snapshot(store)
        key = one_key(store, snapshot.corpus_version, name)
        if key in snapshot.tombstones:
            raise InputError(f"{name}: was forgotten", "see `prag forget --help`")
        base = peft_base(config.model.name)
        check_base_model(snapshot, store, config.model.name, base.facts.fingerprint)
        found, _ = open_adapters(store, snapshot.recipe)
        adapters = AdapterStore(store, found.recipe, found.layout, config.storage.adapter_dtype)
        trained = TrainedAdapter(key, import_peft(adapters.layout, folder, base), 0, 0, 0.0, 0.0, 0.0)
        rows = adapters.commit([(trained, _augmentation(store, adapters.recipe.augment.fingerprint, key))])
        part = store.put_table(
            f"{adapters.folder}/ledger", to_table(LedgerRow, rows)
        )  # `commit` wrote it: get its name
        has_adapter = any(key in store.get_columns(p, ["key"])["key"].to_pylist() for p in snapshot.ledger_parts)
        new = with_ledger(snapshot, {*snapshot.ledger_parts, part}, snapshot.adapters + (not has_adapter))
        publish(store, new, replaces=snapshot.id)
    return key, new.id


def _augmentation(store: Store, recipe: str, key: str) -> str:
    """Return the digest of a passage's augmentation. Of several, a run uses the smallest, and so does this."""
    digests: list[str] = []
    for part in store.list(f"augmentations/{recipe}", ".parquet"):
        table = store.get_columns(part, ["key", "digest"])
        digests += [d for k, d in zip(table["key"].to_pylist(), table["digest"].to_pylist(), strict=True) if k == key]
    if not digests:
        raise InputError(
            f"passage {key} has no augmentation, so the next run would replace the imported adapter",
            "run `prag run` with an augmentation for it first, then import",
        )
    return min(digests)
