"""A published store made in seconds, without Ray: real passages, index and snapshot, adapters of random factors."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pipelines.settings import describe
from prag_core.config import Config
from prag_core.config_file import load_config
from prag_core.identity import fingerprint
from prag_core.llm.lora import TrainedAdapter
from prag_core.records import Passage, passage_table
from prag_core.retrieval.archive import archive_index
from prag_core.retrieval.lucene import build_index
from prag_core.store.adapters import AdapterStore
from prag_core.store.objects import Store, open_store
from prag_core.store.snapshot import Snapshot, created_now, publish
from prag_core.store.tables import put_augmentations
from tests.helpers.adapters import random_adapter
from tests.helpers.passages import make_augmentation
from tests.helpers.workspace import Workspace


def publish_passages(folder: Path, passages: list[Passage]) -> Workspace:
    """A workspace whose store is what `prag run` would have left, but for the adapters' values and its reports."""
    work = Workspace(folder, passages)
    config = load_config(folder / "config.yaml", [f"store={folder / 'store'}", f"model.name={folder / 'tiny'}"])
    store = open_store(config)
    recipe, layout = describe(config)
    # Of its passages, as a real one's: unpacked indexes are kept by the corpus that they are of.
    corpus = fingerprint(sorted(passage.key for passage in passages))
    part = store.put_table(f"corpus/{corpus}", passage_table(sorted(passages, key=lambda p: p.key)))
    store.put_json(f"corpus/{corpus}/manifest.json", {"passages": len(passages), "parts": [part]})
    augmentations = [make_augmentation(passage) for passage in passages]
    put_augmentations(store, recipe.augment.fingerprint, augmentations)
    adapters = AdapterStore(store, recipe, layout)
    adapters.describe()
    trained = [
        (TrainedAdapter(a.key, random_adapter(layout, i), 1, 1, 1.0, 1.0, 0.0), a.digest)
        for i, a in enumerate(augmentations)
    ]
    # Two ledger parts, so that something is put together.
    adapters.commit(trained[: len(trained) // 2])
    adapters.commit(trained[len(trained) // 2 :])
    publish(
        store,
        created_now(
            Snapshot(
                corpus_version=corpus,
                index=_index(config, store, corpus, passages),
                recipe=recipe.fingerprint,
                base_model=recipe.base_model,
                ledger_parts=tuple(adapters.ledger_parts()),
                passages=len(passages),
                adapters=len(passages),
            )
        ),
    )
    return work


def _index(config: Config, store: Store, corpus: str, passages: list[Passage]) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        documents = build_index(passages, Path(scratch) / "lucene", config.index)
        return archive_index(Path(scratch) / "lucene", store, corpus, documents, config.index).id
