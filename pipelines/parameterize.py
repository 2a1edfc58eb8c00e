"""Train stage: augmented passages without an adapter → adapters in shards, made to exist by the ledger."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import ray.data
from rich.console import Console

from cluster.resources import Profile
from pipelines.outcomes import Outcome, Tally, follow, outcome_table, run_actors
from pipelines.report import StageReport
from pipelines.tables import Survey, set_threads, with_augmentations, with_passages
from prag_core.adapter_store import AdapterStore
from prag_core.config import Config
from prag_core.examples import training_examples
from prag_core.models import load_base_model
from prag_core.recipe import Recipe
from prag_core.records import Augmentation, Passage, Reject, from_table, schema
from prag_core.store import Store, put_rejects
from prag_core.trainer import Trainer, TrainingJob


class TrainAdapters:
    """The actor of this stage: holds the frozen model, trains a batch, commits its shard and ledger part."""

    def __init__(self, config: Config, store: Store, recipe: Recipe, run: str, threads: int | None) -> None:
        set_threads(threads)
        base = load_base_model(config.model, expected=recipe.base_model)
        self._trainer = Trainer(base, recipe.train)
        self._adapters = AdapterStore(store, recipe, self._trainer.layout)
        self._tokenizer = base.tokenizer
        self._tokens_per_step = config.run.tokens_per_step
        self._run = run

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Train a batch of passages; give back one outcome each."""
        recipe = self._adapters.recipe
        digests = dict(zip(table["key"].to_pylist(), table["augmentation"].to_pylist(), strict=True))
        sources = {}
        jobs = []
        for passage, augmentation in _passages_and_augmentations(table):
            examples = training_examples(self._tokenizer, passage, augmentation, recipe.train)
            jobs.append(TrainingJob(passage.key, tuple(map(tuple, examples))))
            sources[passage.key] = passage.sources[0]
        trained = list(self._trainer.train(jobs, tokens_per_step=self._tokens_per_step))
        good = [(adapter, digests[adapter.key]) for adapter in trained if adapter.factors is not None]
        rejects = [
            Reject(
                stage="train",
                reason="loss_not_finite",
                detail=f"last loss {adapter.last_loss}; a lower train.learning_rate may help",
                source=sources[adapter.key],
                key=adapter.key,
                recipe=recipe.fingerprint,
            )
            for adapter in trained
            if adapter.factors is None
        ]
        rows = self._adapters.commit(good) if good else []
        put_rejects(self._adapters.store, self._run, rejects)
        yield outcome_table(
            [
                *(Outcome(row.key, bytes=row.length) for row in rows),
                *(Outcome(reject.key, rejected=reject.reason) for reject in rejects),
            ]
        )


def _passages_and_augmentations(table: pa.Table) -> Iterator[tuple[Passage, Augmentation]]:
    passages = from_table(Passage, table)
    defaults = Augmentation("", (), (), "")
    for passage, row in zip(passages, table.select(["rewrites", "pairs", "origin"]).to_pylist(), strict=True):
        plain = {"key": passage.key, **row, "refused": defaults.refused, "attempts": 1, "seconds": 0.0}
        (augmentation,) = from_table(Augmentation, pa.Table.from_pylist([plain], schema=schema(Augmentation)))
        yield passage, augmentation


def run_train(
    config: Config,
    store: Store,
    profile: Profile,
    recipe: Recipe,
    passages: ray.data.Dataset,
    before: Survey,
    run: str,
    console: Console,
) -> StageReport:
    """Train what a survey found missing. Taken are the passages that have an augmentation."""
    tally = Tally()
    total = before.counts["to_train"]
    if total:
        keys = with_passages(before.keys("to_train"), passages, profile.partitions)
        missing = with_augmentations(store, keys, recipe.augment.fingerprint, profile.partitions)
        arguments = (config, store, recipe, run, profile.model_actors.threads)
        outcomes = run_actors(TrainAdapters, arguments, missing, total, config.run.train_batch, profile)
        follow(outcomes, total, "train", console, tally)
    return StageReport(
        stage="train",
        taken=before.augmented,
        done=before.counts["done"] + tally.done,
        earlier=before.counts["done"],
        rejected=dict(before.reasons["train_rejected"] + tally.rejected),
        seconds=tally.seconds,
        bytes=tally.bytes,
    )
