"""Train stage: augmented passages without an adapter → adapters in shards, made to exist by the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from cluster.resources import Profile
from pipelines.execution.child_process import Alive
from pipelines.execution.isolation import StageRun, run_actors
from pipelines.execution.outcomes import TASK, Budget, Outcome, StageReport, Tally, outcome_table
from pipelines.execution.progress import RunProgress, follow_outcomes
from pipelines.execution.recovery import resume_until_done
from pipelines.execution.survey import Survey, with_augmentations
from prag_core.config import Config
from prag_core.llm.base_model import load_base_model
from prag_core.llm.layout import LoraLayout, adapter_size_bytes
from prag_core.llm.threads import compute_here
from prag_core.recipe import Recipe
from prag_core.records import Augmentation, LedgerRow, Passage, Reject, from_table, schema
from prag_core.store.adapters import AdapterStore, get_start
from prag_core.store.objects import Store
from prag_core.store.runs import check_holder
from prag_core.store.tables import put_rejects
from prag_core.training.examples import TrainingJob, training_examples

if TYPE_CHECKING:
    from prag_core.llm.lora import TrainedAdapter


# A task is lost with the actor that does it, shows its progress at its end, and is what the actors of a pool share:
# each should get some, even when they do not fill their shards.
_TASKS_AN_ACTOR = 8

# What can be done about each way in which training fails.
_DETAIL = {
    "loss_not_finite": "last loss {}; a lower train.learning_rate may help",
    "out_of_memory": "the device has too little memory for this passage alone; lower train.max_tokens",
}


class TrainAdapters:
    """The actor of this stage: holds the frozen model, trains a batch, commits its shards and ledger parts."""

    def __init__(self, config: Config, store: Store, recipe: Recipe, run: str, profile: Profile) -> None:
        # Here, since the driver imports this module too, and torch would cost it seconds.
        from prag_core.training.trainer import Trainer

        compute_here(profile.train.threads)
        base = load_base_model(config.model, expected=recipe.base_model)
        start = get_start(store, recipe.train.start) if recipe.train.start else None
        self._trainer = Trainer(base, recipe.train, start, checkpoint=config.run.checkpoint_activations)
        self._adapters = AdapterStore(store, recipe, self._trainer.layout, config.storage.adapter_dtype)
        self._a_shard = adapters_a_shard(config, self._trainer.layout)
        self._commit_every_s = config.run.commit_every_s
        self._tokenizer = base.tokenizer
        self._tokens_per_step = profile.tokens_per_step
        self._run = run

    def __call__(self, table: pa.Table, alive: Alive) -> Iterator[pa.Table]:
        """Train a batch of passages; give back one outcome each, and be `alive` with each step of training.

        What another attempt at the batch, or at one that it is a part of, committed before its process died is not
        trained again: both have the same column `task`.
        """
        recipe = self._adapters.recipe
        digests = dict(zip(table["key"].to_pylist(), table["augmentation"].to_pylist(), strict=True))
        task = table[TASK][0].as_py()
        rows = [row for row in self._adapters.committed(task) if digests.get(row.key) == row.augmentation]
        earlier = {row.key for row in rows}
        sources = {}
        jobs = []
        rejects = []

        def give_up(key: str, reason: str, detail: str) -> None:
            rejects.append(Reject("train", reason, detail, sources[key], key, recipe=recipe.fingerprint))

        for passage, augmentation in _passages_and_augmentations(table):
            if passage.key in earlier:
                continue
            sources[passage.key] = passage.sources[0]
            examples = training_examples(self._tokenizer, passage, augmentation, recipe.train)
            if examples:
                jobs.append(TrainingJob(passage.key, examples))
            else:
                give_up(passage.key, "nothing_to_train", "train.max_tokens cuts off each answer; raise it")
        yield _outcomes(rows)
        waiting: list[tuple[TrainedAdapter, str]] = []
        since = time.monotonic()
        training = self._trainer.train(jobs, tokens_per_step=self._tokens_per_step, on_step=lambda step, steps: alive())
        for adapter in training:
            if adapter.factors is None:
                give_up(adapter.key, adapter.failure, _DETAIL[adapter.failure].format(adapter.last_loss))
            else:
                waiting.append((adapter, digests[adapter.key]))
            # What is committed is told at once: it stays so, whatever becomes of the rest of the batch.
            if len(waiting) >= self._a_shard or time.monotonic() - since >= self._commit_every_s:
                yield _outcomes(self._commit(waiting, task))
                waiting, since = [], time.monotonic()
        yield _outcomes(self._commit(waiting, task))
        put_rejects(self._adapters.store, self._run, rejects)
        yield outcome_table(Outcome(reject.key, rejected=reject.reason) for reject in rejects)

    def _commit(self, adapters: Sequence[tuple[TrainedAdapter, str]], task: str) -> list[LedgerRow]:
        if not adapters:
            return []
        check_holder(self._adapters.store, self._run)
        return self._adapters.commit(adapters, task)


def _outcomes(rows: Sequence[LedgerRow]) -> pa.Table:
    return outcome_table(Outcome(r.key, bytes=r.length, tokens=r.tokens, seconds=r.seconds) for r in rows)


def adapters_a_shard(config: Config, layout: LoraLayout) -> int:
    """Return how many adapters fill a shard."""
    return max(1, int(config.storage.shard_mb * 1e6) // adapter_size_bytes(layout, config.storage.adapter_dtype))


def passages_a_task(total: int, config: Config, profile: Profile, layout: LoraLayout) -> int:
    """Return how many passages a training task takes: a shard's, or fewer where all actors would not have enough."""
    share = -(-total // (_TASKS_AN_ACTOR * profile.train.most))
    return min(adapters_a_shard(config, layout), max(config.run.train_batch, share))


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
    layout: LoraLayout,
    passages: ray.data.Dataset,
    before: Survey,
    look: Callable[[], Survey],
    budget: Budget,
    progress: RunProgress,
) -> StageReport:
    """Train what a survey found missing. Taken are the passages that have an augmentation.

    `look` makes a new survey, should a part of the cluster be lost meanwhile; `budget` is what the run may reject,
    besides what a survey found rejected.
    """
    begun = time.perf_counter()

    def work(survey: Survey) -> Tally:
        total = survey.counts["to_train"]
        if not total:
            return Tally()
        fingerprint = recipe.augment.fingerprint
        missing = with_augmentations(store, survey, "to_train", passages, fingerprint, profile)
        # Like lengths together in a batch: padding is computed like any token.
        missing = missing.map_batches(with_length, batch_format="pyarrow").sort("length")
        arguments = (config, store, recipe, progress.run, profile)
        desk = StageRun(store, progress.run, "train", recipe.fingerprint)
        batch = passages_a_task(total, config, profile, layout)
        silence_s = config.run.passage_timeout_s
        outcomes = run_actors(
            TrainAdapters,
            arguments,
            missing,
            batch,
            profile.train,
            desk,
            config.run,
            silence_s=silence_s,
            preload=["prag_core.training.trainer"],
        )
        return follow_outcomes(outcomes, total, "train", progress, budget.less(survey.rejected))

    last, tally = resume_until_done("train", "to_train", before, look, work, progress)
    return StageReport(
        stage="train",
        taken=last.augmented,
        done=last.counts["done"] + tally.done,
        earlier=before.counts["done"],
        rejected=dict(last.reasons["train_rejected"] + tally.rejected),
        seconds=time.perf_counter() - begun,
        bytes=tally.bytes,
    )


def with_length(table: pa.Table) -> pa.Table:
    """Append the column `length`: the characters of a passage and its rewrites.

    It is here since a task imports the module of its function, and that of the actors imports torch.
    """
    rewrites = pc.binary_join(table["rewrites"], "")
    return table.append_column("length", pc.add(pc.utf8_length(table["text"]), pc.utf8_length(rewrites)))
