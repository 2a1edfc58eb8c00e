"""Opening a snapshot on this machine: its index, its adapters and its reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prag_core.config import Config
from prag_core.errors import AdapterError, ConfigError, StoreError
from prag_core.inference.processor import RequestProcessor
from prag_core.llm.base_model import BaseModel
from prag_core.llm.checkpoint import cache_dir
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import Factors, FlatAdapter, check_factors, find_targets, flatten_adapter
from prag_core.recipe import TrainRecipe
from prag_core.retrieval.archive import open_index
from prag_core.store.adapters import LedgerSource, get_start, open_adapters
from prag_core.store.objects import Store
from prag_core.store.snapshot import Snapshot, check_base_model, forgotten_keys


@dataclass(frozen=True, eq=False)
class LoadedSnapshot:
    """An open snapshot; together with the base model it is all that answering needs.

    `processor` searches its index and writes prompts, `source` finds its adapters, and `close` closes its files.
    """

    id: str
    processor: RequestProcessor
    source: LedgerSource
    recipe: TrainRecipe
    layout: LoraLayout
    close: Callable[[], None]


def open_reader(store: Store, config: Config, layout: LoraLayout) -> tuple[Factors, float] | None:
    """Return the factors and the weight of the configured reader; None when none is configured.

    Raises:
        ConfigError: when the store has no such adapter, or it does not have this layout.
    """
    name = config.answer.reader
    if name is None:
        return None
    try:
        factors = get_start(store, name)
        check_factors(layout, factors, name)
    except AdapterError as error:
        raise ConfigError(
            f"answer.reader = {name!r}: {error.message}",
            "use the name that `prag warmup --reading` printed, or train the reader again",
        ) from None
    return factors, config.answer.reader_strength


def load_reader(base: BaseModel, store: Store, config: Config, layout: LoraLayout) -> tuple[FlatAdapter, float] | None:
    """Return the configured reader as `RequestProcessor` takes it; it raises what `open_reader` raises."""
    reader = open_reader(store, config, layout)
    if reader is None:
        return None
    factors, weight = reader
    return flatten_adapter(layout, factors, dtype=base.model.dtype), weight


def open_snapshot(base: BaseModel, config: Config, store: Store, snapshot: Snapshot) -> LoadedSnapshot:
    """Open a snapshot. Its index is unpacked into the local cache on first use; adapters are fetched when needed.

    Raises:
        StoreError: when it was made with another base model, or an object that it names is missing.
        ConfigError: when `answer.reader` is no adapter of this layout in the store.
        ModelError: when the model lacks modules that the adapters change.
        RetrievalError: when the index cannot be opened.
    """
    check_base_model(snapshot, store, config.model.name, base.fingerprint)
    adapters, recipe = open_adapters(store, snapshot.recipe)
    layout, _ = find_targets(base.model, recipe)
    if layout != adapters.layout:
        raise StoreError(
            f"{store.url}/{adapters.folder}/recipe.json: says {adapters.layout}, but its recipe makes {layout} here",
            "it was written by hand or by another version: run `prag run` again",
        )
    reader = load_reader(base, store, config, layout)
    hidden, source = forgotten_keys(store, snapshot), LedgerSource(adapters, snapshot.ledger_parts)
    # The index is opened last, so that no other error leaves one open in the Java machine.
    retriever = open_index(store, snapshot.index, cache_dir() / "indexes", config.index)
    processor = RequestProcessor(
        base,
        retriever,
        template=recipe.template,
        snapshot=snapshot.id,
        max_new_tokens=config.answer.max_new_tokens,
        combine_strength=config.answer.combine_strength,
        reader=reader,
        hidden=hidden,
        find=source.find,
        route=snapshot.route,
    )
    return LoadedSnapshot(snapshot.id, processor, source, recipe, layout, retriever.close)
