"""Train stage: augmented passages without an adapter → adapters in shards, made to exist by the ledger."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from rich.console import Console

from cluster.resources import Profile
from pipelines.outcomes import Outcome, Tally, follow, outcome_table, run_actors
from pipelines.report import StageReport
from pipelines.tables import Survey, set_threads, with_augmentations, with_passages
from prag_core.adapter_store import AdapterStore, get_start
from prag_core.config import Config
from prag_core.examples import training_examples
from prag_core.models import load_base_model
from prag_core.recipe import Recipe
from prag_core.records import Augmentation, Passage, Reject, from_table, schema
from prag_core.store import Store, put_rejects
from prag_core.trainer import Trainer, TrainingJob

# What can be done about each way in which training fails.
_DETAIL = {
    "loss_not_finite": "last loss {}; a lower train.learning_rate may help",
    "out_of_memory": "the device has too little memory for this passage alone; lower train.max_tokens",
}


class TrainAdapters:
    """The actor of this stage: holds the frozen model, trains a batch, commits its shard and ledger part."""

    def __init__(self, config: Config, store: Store, recipe: Recipe, run: str, profile: Profile) -> None:
        set_threads(profile.model_actors.threads)
        base = load_base_model(config.model, expected=recipe.base_model)
        start = get_start(store, recipe.train.start) if recipe.train.start else None
        self._trainer = Trainer(base, recipe.train, start, checkpoint=config.run.checkpoint_activations)
        self._adapters = AdapterStore(store, recipe, self._trainer.layout, config.storage.adapter_dtype)
        self._tokenizer = base.tokenizer
        self._tokens_per_step = config.run.tokens_per_step or profile.tokens_per_step
        self._run = run

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Train a batch of passages; give back one outcome each."""
        recipe = self._adapters.recipe
        digests = dict(zip(table["key"].to_pylist(), table["augmentation"].to_pylist(), strict=True))
        sources = {}
        jobs = []
        rejects = []

        def give_up(key: str, reason: str, detail: str) -> None:
            rejects.append(Reject("train", reason, detail, sources[key], key, recipe=recipe.fingerprint))

        for passage, augmentation in _passages_and_augmentations(table):
            sources[passage.key] = passage.sources[0]
            examples = training_examples(self._tokenizer, passage, augmentation, recipe.train)
            if examples:
                jobs.append(TrainingJob(passage.key, examples))
            else:
                give_up(passage.key, "nothing_to_train", "train.max_tokens cuts off each answer; raise it")
        trained = list(self._trainer.train(jobs, tokens_per_step=self._tokens_per_step))
        good = [(adapter, digests[adapter.key]) for adapter in trained if adapter.factors is not None]
        for adapter in trained:
            if adapter.factors is None:
                give_up(adapter.key, adapter.failure, _DETAIL[adapter.failure].format(adapter.last_loss))
        rows = self._adapters.commit(good) if good else []
        put_rejects(self._adapters.store, self._run, rejects)
        yield outcome_table(
            [
                *(Outcome(row.key, bytes=row.length) for row in rows),
                *(Outcome(reject.key, rejected=reject.reason) for reject in rejects),
            ]
        )


def _add_length(table: pa.Table) -> pa.Table:
    rewrites = pc.binary_join(table["rewrites"], "")
    lengths = pc.add(pc.utf8_length(table["text"]), pc.utf8_length(rewrites))
    return table.append_column("length", lengths)


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
        # Like lengths together in a batch: padding is computed like any token.
        missing = missing.map_batches(_add_length, batch_format="pyarrow").sort("length")
        arguments = (config, store, recipe, run, profile)
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
