"""What a run would do, from what is already in the store. Spends nothing and writes nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.resources import PROFILES, Profile
from cluster.session import ray_session
from pipelines import ingest
from pipelines.job import describe
from pipelines.tables import read_parts, survey
from prag_core.adapter_io import adapter_size_bytes
from prag_core.config import Config
from prag_core.examples import training_examples
from prag_core.models import load_tokenizer, resolve_model
from prag_core.recipe import Recipe
from prag_core.records import Augmentation, Passage, QAPair, from_dict
from prag_core.snapshot import current_id, load_snapshot
from prag_core.store import Store, open_store

_SAMPLE = 64


@dataclass(frozen=True)
class Plan:
    """What is to be done, and what it takes. Seconds are None where the store holds no measurement yet."""

    records: int
    rejected: dict[str, int]
    passages: int
    duplicates: int
    to_augment: int
    to_train: int
    tokens: int
    adapter_bytes: int
    augment_seconds: float | None
    train_seconds: float | None
    recipe: str

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return asdict(self)


def make_plan(config: Config) -> Plan:
    """Read the corpus, compare it with the store, and estimate what is missing.

    Tokens are those of training, over all epochs, estimated from a sample of passages; seconds come from what
    earlier runs of the same recipe took a token (training) or a passage (augmenting) on one actor.
    """
    store = open_store(config)
    profile = PROFILES[config.run.profile]
    recipe, layout = describe(config)
    with ray_session(profile):
        forgotten = load_snapshot(store).tombstones if current_id(store) else ()
        corpus = ingest.ingest(config.corpus, profile.partitions, forgotten)
        counts = survey(store, corpus.passages, recipe, profile.partitions).counts
        to_augment = counts["to_augment"]
        to_train = to_augment + counts["to_train"]
        sample = [from_dict(Passage, row) for row in corpus.passages.take(_SAMPLE)]
        (augment_rate,) = _means(store, f"augmentations/{recipe.augment.fingerprint}", ["seconds"], profile)
        seconds, tokens = _means(store, f"adapters/{recipe.fingerprint}/ledger", ["seconds", "tokens"], profile)
    tokens_each = _tokens_each(config, recipe, sample)
    total_tokens = round(to_train * tokens_each)
    return Plan(
        records=corpus.report.taken,
        rejected=dict(corpus.report.rejected),
        passages=corpus.count,
        duplicates=corpus.report.extra["duplicates"],
        to_augment=to_augment,
        to_train=to_train,
        tokens=total_tokens,
        adapter_bytes=to_train * adapter_size_bytes(layout, config.storage.adapter_dtype),
        augment_seconds=None if augment_rate is None else to_augment * augment_rate,
        train_seconds=None if seconds is None or not tokens else total_tokens * seconds / tokens,
        recipe=recipe.fingerprint,
    )


def _tokens_each(config: Config, recipe: Recipe, sample: list[Passage]) -> float:
    """Estimate a passage's training tokens as if its rewrite were as long as itself, its questions 20 words."""
    if not sample:
        return 0.0
    tokenizer = load_tokenizer(resolve_model(config.model.name))
    pair = QAPair("word " * 15, "word " * 3, "")
    total = 0
    for passage in sample:
        rewrites = (passage.text,) * recipe.augment.rewrites
        augmentation = Augmentation(passage.key, rewrites, (pair,) * recipe.augment.pairs, "planned")
        total += sum(len(e.ids) for e in training_examples(tokenizer, passage, augmentation, recipe.train))
    return recipe.train.epochs * total / len(sample)


def _means(store: Store, folder: str, columns: list[str], profile: Profile) -> list[float | None]:
    rows = read_parts(store, folder, columns, profile.partitions)
    if rows is None:
        return [None] * len(columns)
    sums = rows.map_batches(_sums, batch_size=None, batch_format="pyarrow").take_all()
    count = sum(row["count"] for row in sums)
    return [sum(row[column] for row in sums) / count if count else None for column in columns]


def _sums(table: pa.Table) -> pa.Table:
    sums = {name: [float(pc.sum(table[name]).as_py() or 0)] for name in table.column_names}
    return pa.table({**sums, "count": [table.num_rows]})
