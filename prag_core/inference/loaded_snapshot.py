"""A snapshot opened on this machine: all that answering from it needs, beside the base model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prag_core.config import Config
from prag_core.errors import AdapterError, ConfigError, StoreError
from prag_core.inference.processor import RequestProcessor
from prag_core.llm.base_model import BaseModel
from prag_core.llm.checkpoint import cache_dir
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import Factors, check_factors, find_targets
from prag_core.recipe import TrainRecipe
from prag_core.retrieval.archive import open_index
from prag_core.store.adapters import LedgerSource, get_start, open_adapters
from prag_core.store.objects import Store
from prag_core.store.snapshot import Snapshot, check_base_model, forgotten_keys


@dataclass(frozen=True, eq=False)
class LoadedSnapshot:
    """A snapshot's id, its searches and prompts, its adapters and their shape; `close` lets its files go."""

    id: str
    preparation: RequestProcessor
    source: LedgerSource
    recipe: TrainRecipe
    layout: LoraLayout
    close: Callable[[], None]


def open_reader(store: Store, config: Config, layout: LoraLayout) -> tuple[Factors, float] | None:
    """Return the configured reader's factors and weight, if there is one.

    Raises:
        ConfigError: when the store has none of that name, or not of this shape.
    """
    name = config.answer.reader
    if name is None:
        return None
    try:
        factors = get_start(store, name)
        check_factors(layout, factors, name)
    except AdapterError as error:
        raise ConfigError(
            f"answer.reader = {name!r}: {error.message}", "name what `prag warmup --reading` printed, or make it again"
        ) from None
    return factors, config.answer.reader_strength


def open_snapshot(base: BaseModel, config: Config, store: Store, snapshot: Snapshot) -> LoadedSnapshot:
    """Open a snapshot. Its index is unpacked into the local cache on first use; adapters come when they are needed.

    Raises:
        StoreError: when it was made with another base model, or what it names is missing.
        ConfigError: when `answer.reader` names nothing of this shape.
        ModelError: when the model has not the modules that the adapters are for.
        RetrievalError: when the index cannot be opened.
    """
    check_base_model(snapshot, store, config.model.name, base.fingerprint)
    adapters, recipe = open_adapters(store, snapshot.recipe)
    layout, _ = find_targets(base.model, recipe)
    if layout != adapters.layout:
        raise StoreError(
            f"{store.url}/{adapters.folder}/recipe.json: says {adapters.layout}; its recipe means {layout} here",
            "it was written by hand or by another version: run `prag run` again",
        )
    reader = open_reader(store, config, layout)
    hidden, source = forgotten_keys(store, snapshot), LedgerSource(adapters, snapshot.ledger_parts)
    # The index last: nothing that fails before it leaves one open in the Java machine.
    retriever = open_index(store, snapshot.index, cache_dir() / "indexes", config.index)
    preparation = RequestProcessor(
        base,
        retriever,
        template=recipe.template,
        snapshot=snapshot.id,
        max_new_tokens=config.answer.max_new_tokens,
        combine_strength=config.answer.combine_strength,
        reader=reader,
        hidden=hidden,
    )
    return LoadedSnapshot(snapshot.id, preparation, source, recipe, layout, retriever.close)
