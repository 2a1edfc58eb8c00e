"""A small published world to serve: passages whose adapters make the tiny model say one letter again and again."""

from __future__ import annotations

import re
import string
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from prag_core.config import AugmentConfig, ServeConfig, augment_recipe
from prag_core.inference.adapter_cache import AdapterCache
from prag_core.inference.disk_cache import DiskCache
from prag_core.inference.loaded_snapshot import LoadedSnapshot
from prag_core.inference.processor import RequestProcessor
from prag_core.inference.service import Service
from prag_core.llm.base_model import BaseModel
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import TrainedAdapter, find_targets
from prag_core.recipe import RECIPES, Recipe, TrainRecipe
from prag_core.records import Hit, Passage
from prag_core.retrieval.kinds import Retriever
from prag_core.store.adapters import AdapterStore, LedgerSource, open_adapters
from prag_core.store.objects import Store
from prag_core.store.snapshot import Snapshot, created_now, current_id, load_snapshot, publish
from tests.helpers.passages import make_passage

PASSAGES = [make_passage(n, words=3) for n in range(62)]
LETTERS = string.ascii_letters + string.digits


class ByNumber:
    """A retriever that finds the passages whose numbers the question names, the first named first."""

    def search(self, question: str, top_k: int, min_score: float = 0.0) -> list[Hit]:
        found = [int(number) for number in re.findall(r"\d+", question)]
        hits = [Hit(PASSAGES[n], 10.0 - place) for place, n in enumerate(found) if n < len(PASSAGES)]
        return [hit for hit in hits[:top_k] if hit.score >= min_score]


def marker_adapter(base: BaseModel, layout: LoraLayout, letter: str) -> dict[str, torch.Tensor]:
    """An adapter after which the model says `letter` whatever it reads.

    In the last layer, units of the feed-forward network get ±c (a·h) as gate and as up, for two directions a; of
    silu(g) g + silu(-g) (-g) = g² comes a positive number that points to the letter's embedding, far longer than all
    else. One direction would do, but for the few states h that are nearly orthogonal to it.
    """
    factors = {name: torch.zeros(shape) for name, shape in layout.tensor_shapes.items()}
    directions = torch.randn(2, layout.tensor_shapes["gate_proj.A"][2], generator=torch.Generator().manual_seed(0))
    token = base.tokenizer.encode(letter, add_special_tokens=False)[0]
    for target in ("gate_proj", "up_proj"):
        factors[f"{target}.A"][-1, :2] = directions
        for place in range(2):
            factors[f"{target}.B"][-1, 2 * place, place] = 10.0
            factors[f"{target}.B"][-1, 2 * place + 1, place] = -10.0
    factors["down_proj.A"][-1, 0, :4] = 1.0
    factors["down_proj.B"][-1, :, 0] = 100.0 * base.model.get_input_embeddings().weight[token]
    return factors


class World:
    """A store with published snapshots of marker adapters, and services on it."""

    def __init__(self, base: BaseModel, folder: Path) -> None:
        self.base = base
        self.folder = folder
        self.store = Store(str(folder / "store"))
        self.letters: dict[str, Callable[[int], str]] = {}
        self.retriever: Retriever = ByNumber()
        self.on_close: Callable[[], None] = lambda: None

    def publish(self, shift: int = 0, train: TrainRecipe = RECIPES["recall"], count: int = len(PASSAGES)) -> Snapshot:
        """Publish adapters of which number n says the letter n + `shift`."""
        recipe = Recipe(self.base.fingerprint, augment_recipe(AugmentConfig(generator="none"), "none", train), train)
        layout, _ = find_targets(self.base.model, train)
        adapters = AdapterStore(self.store, recipe, layout, "float32")
        adapters.describe()
        chosen = [
            (trained(passage, marker_adapter(self.base, layout, LETTERS[(n + shift) % len(LETTERS)])), f"shift{shift}")
            for n, passage in enumerate(PASSAGES[:count])
        ]
        adapters.commit(chosen)
        snapshot = created_now(
            Snapshot(
                corpus_version=f"shift{shift}",
                index="none",
                recipe=recipe.fingerprint,
                base_model=self.base.fingerprint,
                ledger_parts=tuple(adapters.ledger_parts()),
                passages=len(PASSAGES),
                adapters=count,
            )
        )
        publish(self.store, snapshot)
        self.letters[snapshot.id] = lambda n: LETTERS[(n + shift) % len(LETTERS)]
        return snapshot

    def open(self, id: str | None = None) -> LoadedSnapshot:
        snapshot = load_snapshot(self.store, id)
        adapters, recipe = open_adapters(self.store, snapshot.recipe)
        layout, _ = find_targets(self.base.model, recipe)
        source = LedgerSource(adapters, snapshot.ledger_parts)
        processor = RequestProcessor(
            self.base,
            self.retriever,
            snapshot=snapshot.id,
            max_new_tokens=4,
            hidden=snapshot.tombstones,
            find=source.find,
            route=snapshot.route,
        )
        return LoadedSnapshot(snapshot.id, processor, source, recipe, layout, self.on_close)

    @contextmanager
    def service(self, *, disk: DiskCache | None = None, **settings: Any) -> Iterator[Service]:
        config = ServeConfig(**settings)
        cache = AdapterCache(
            config.cache_bytes,
            dtype=self.base.model.dtype,
            disk=disk,
            threads=config.fetch_threads,
            negative_ttl_s=config.negative_ttl_s,
        )
        service = Service(self.base, self.open, lambda: current_id(self.store), cache, config)
        try:
            yield service
        finally:
            service.close()


def trained(passage: Passage, factors: dict[str, torch.Tensor]) -> TrainedAdapter:
    return TrainedAdapter(passage.key, factors, steps=1, tokens=1, first_loss=1.0, last_loss=0.5, seconds=0.1)


class Hold:
    """Forward passes wait; `entered` says that one does, and `let_go` ends it."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._go = threading.Event()

    def wait(self, *_: Any) -> None:
        self.entered.set()
        self._go.wait()

    def let_go(self) -> None:
        self._go.set()


@contextmanager
def held(base: BaseModel) -> Iterator[Hold]:
    """Within this context each forward pass waits until it is let go."""
    hold = Hold()
    handle = base.model.get_input_embeddings().register_forward_hook(hold.wait)
    try:
        yield hold
    finally:
        hold.let_go()
        handle.remove()


def named(numbers: Sequence[int]) -> str:
    return "What of " + " and ".join(map(str, numbers))
