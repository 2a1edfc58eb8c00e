"""What a run would do, from what is already in the store. Spends nothing and writes nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.compute as pc
import ray.data

from cluster.resources import PROFILES
from cluster.session import ray_session
from pipelines import augment, ingest, parameterize
from pipelines.job import describe
from pipelines.tables import augmented, read_table
from prag_core.adapter_io import DTYPES
from prag_core.config import Config
from prag_core.examples import training_examples
from prag_core.models import load_tokenizer, resolve_model
from prag_core.recipe import Recipe
from prag_core.records import Augmentation, LedgerRow, Passage, QAPair, from_dict
from prag_core.store import Store

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
    store = Store(config.store)
    profile = PROFILES[config.run.profile]
    recipe, layout = describe(config)
    with ray_session(profile):
        corpus = ingest.ingest(config.corpus, profile.partitions)
        to_augment = augment.todo(store, corpus.passages, recipe.augment, profile.partitions).count()
        ready = augmented(store, corpus.passages, recipe.augment.fingerprint, profile.partitions)
        to_train = to_augment
        if ready is not None:
            to_train += parameterize.todo(store, ready, recipe, profile.partitions).count()
        sample = [from_dict(Passage, row) for row in corpus.passages.take(_SAMPLE)]
        augment_rate = _mean(read_table(store, f"augmentations/{recipe.augment.fingerprint}", Augmentation), "seconds")
        ledger = read_table(store, f"adapters/{recipe.fingerprint}/ledger", LedgerRow)
        seconds, tokens = _mean(ledger, "seconds"), _mean(ledger, "tokens")
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
        adapter_bytes=to_train * layout.parameters * DTYPES["bfloat16"].itemsize,
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
        total += sum(map(len, training_examples(tokenizer, passage, augmentation, recipe.train)))
    return recipe.train.epochs * total / len(sample)


def _mean(rows: ray.data.Dataset | None, column: str) -> float | None:
    if rows is None:
        return None
    total, count = 0.0, 0
    for batch in rows.select_columns([column]).iter_batches(batch_size=None, batch_format="pyarrow"):
        total += pc.sum(batch[column]).as_py() or 0.0
        count += batch.num_rows
    return total / count if count else None
