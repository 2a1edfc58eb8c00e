"""Train stage: augmented passages without an adapter → adapters in shards, committed by ledger parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from pipelines.execution.child_process import Finish, Heartbeat
from pipelines.execution.isolation import StageRun, run_actors
from pipelines.execution.outcomes import TASK, Budget, Outcome, StageReport, Tally, outcome_table
from pipelines.execution.progress import RunProgress, follow_outcomes
from pipelines.execution.recovery import resume_until_done
from pipelines.execution.survey import Survey, with_augmentations
from pipelines.execution.tables import map_blocks
from pipelines.settings import RunContext
from prag_core.errors import TurnsError
from prag_core.llm.base_model import load_base_model
from prag_core.llm.layout import adapter_size_bytes
from prag_core.llm.threads import compute_here
from prag_core.records import Augmentation, LedgerRow, Passage, Reject, from_dict
from prag_core.store.adapters import AdapterStore, get_start
from prag_core.store.runs import check_holder
from prag_core.store.tables import put_rejects
from prag_core.training.examples import TrainingJob, training_examples

if TYPE_CHECKING:
    from prag_core.llm.lora import TrainedAdapter
    from prag_core.training.trainer import Trainer


# An actor trains one task while another is tokenized or committed.
LANES = 2
# The least number of tasks for each actor, even if they do not fill their shards: a task is lost with its actor, shows
# its progress only at its end, and is the unit that actors share.
_TASKS_PER_ACTOR = 8

# The detail of a reject for each way in which training fails, with the last loss.
_DETAIL = {
    "loss_not_finite": "last loss {}; a lower train.learning_rate may help",
    "nothing_learned": "training did not change the adapter; raise train.learning_rate",
    "equals_another": "another passage has the same adapter, since it has the same examples; give it pairs of its own",
    "out_of_memory": "the device has too little memory for this passage alone; lower train.max_tokens",
}


@dataclass
class PreparedTask:
    """A training task: what to train, and the augmentation's digest of each of its passages.

    `committed` are the adapters of an earlier attempt at it, and `rejects` the passages that were given up so far.
    """

    name: str
    digests: Mapping[str, str]
    committed: Sequence[LedgerRow]
    sources: dict[str, str] = field(default_factory=dict)
    jobs: list[TrainingJob] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)


class TrainAdapters:
    """The actor of this stage: it holds the frozen model, trains a batch, and commits shards and ledger parts.

    The next batch is tokenized, and the shard of the one before is packed and written, beside the training: a GPU
    trains a passage in the time that these take.
    """

    def __init__(self, context: RunContext) -> None:
        compute_here(context.profile.train.threads)
        self._trainer, self._tokenizer = self._load(context)
        dtype = context.config.storage.adapter_dtype
        self._adapters = AdapterStore(context.store, context.recipe, context.layout, dtype)
        self._adapters_per_shard = adapters_per_shard(context)
        self._commit_every_s = context.config.run.commit_every_s
        self._tokens_per_step = context.profile.tokens_per_step
        self._run = context.run

    def _load(self, context: RunContext) -> tuple[Trainer, Any]:
        """Return the trainer, with the frozen model, and the model's tokenizer."""
        # Imported here: the driver imports this module too, and torch would cost it seconds.
        from prag_core.training.trainer import Trainer

        train = context.recipe.train
        gpus = context.profile.train.gpus
        base = load_base_model(context.config.model, expected=context.recipe.base_model, gpus=gpus)
        start = get_start(context.store, train.start) if train.start else None
        checkpoint = context.config.run.checkpoint_activations
        return Trainer(base, train, start, checkpoint=checkpoint), base.tokenizer

    def prepare(self, table: pa.Table) -> PreparedTask:
        """Return the examples of a batch's passages, without those that an earlier attempt at this batch committed.

        All attempts at a batch, and at parts of it, have the same value in the column `task`.
        """
        recipe = self._adapters.recipe
        digests = dict(zip(table["key"].to_pylist(), table["augmentation"].to_pylist(), strict=True))
        name = table[TASK][0].as_py()
        committed = [row for row in self._adapters.committed(name) if digests.get(row.key) == row.augmentation]
        task = PreparedTask(name, digests, committed)
        done = {row.key for row in committed}
        for row in table.to_pylist():
            passage, augmentation = from_dict(Passage, row), from_dict(Augmentation, row)
            if passage.key in done:
                continue
            task.sources[passage.key] = passage.sources[0]
            try:
                examples = training_examples(self._tokenizer, passage, augmentation, recipe.train)
            except TurnsError as error:
                self._reject(task, passage.key, "not_encodable", error.message)
                continue
            if examples:
                task.jobs.append(TrainingJob(passage.key, examples))
            else:
                detail = f"no example has at most train.max_tokens = {recipe.train.max_tokens} tokens; raise it"
                self._reject(task, passage.key, "nothing_to_train", detail)
        return task

    def __call__(self, task: PreparedTask, heartbeat: Heartbeat) -> Iterator[pa.Table | Finish]:
        """Train a batch of passages; yield one outcome for each, or the commit that returns the outcomes.

        `heartbeat` is called with each training step.
        """
        yield _outcomes(task.committed)
        waiting: list[tuple[TrainedAdapter, str]] = []
        since = time.monotonic()
        trained, passages = 0, len(task.digests)

        def on_step(step: int, steps: int, adapters: int) -> None:
            heartbeat((len(task.committed) + trained + adapters * step / steps) / passages)

        for adapter in self._trainer.train(task.jobs, tokens_per_step=self._tokens_per_step, on_step=on_step):
            trained += 1
            if adapter.factors is None:
                self._reject(task, adapter.key, adapter.failure, _DETAIL[adapter.failure].format(adapter.last_loss))
            else:
                waiting.append((adapter, task.digests[adapter.key]))
            # Committed adapters are reported at once: they stay, even if the rest of the batch is lost.
            if len(waiting) >= self._adapters_per_shard or time.monotonic() - since >= self._commit_every_s:
                yield partial(self._commit, waiting, task.name)
                waiting, since = [], time.monotonic()
        yield partial(self._end, waiting, task)

    def _reject(self, task: PreparedTask, key: str, reason: str, detail: str) -> None:
        recipe = self._adapters.recipe.fingerprint
        task.rejects.append(Reject("train", reason, detail, task.sources[key], key, recipe=recipe))

    def _commit(self, adapters: Sequence[tuple[TrainedAdapter, str]], task: str) -> pa.Table:
        if not adapters:
            return _outcomes([])
        check_holder(self._adapters.store, self._run)
        return _outcomes(self._adapters.commit(adapters, task))

    def _end(self, adapters: Sequence[tuple[TrainedAdapter, str]], task: PreparedTask) -> pa.Table:
        committed = self._commit(adapters, task.name)
        put_rejects(self._adapters.store, self._run, task.rejects)
        rejected = outcome_table(Outcome(r.key, rejected=r.reason) for r in task.rejects)
        return pa.concat_tables([committed, rejected])


def _outcomes(rows: Sequence[LedgerRow]) -> pa.Table:
    return outcome_table(Outcome(r.key, bytes=r.length, tokens=r.tokens, seconds=r.seconds) for r in rows)


def adapters_per_shard(context: RunContext) -> int:
    """Return how many adapters fill a shard."""
    storage = context.config.storage
    return max(1, int(storage.shard_mb * 1e6) // adapter_size_bytes(context.layout, storage.adapter_dtype))


def passages_per_task(total: int, context: RunContext, actors: int) -> int:
    """Return how many passages a training task takes: enough for a shard, or fewer so that all `actors` have tasks."""
    share = -(-total // (_TASKS_PER_ACTOR * actors))
    return min(adapters_per_shard(context), max(context.config.run.train_batch, share))


def run_train(
    context: RunContext,
    passages: ray.data.Dataset,
    first: Survey,
    take_survey: Callable[[], Survey],
    budget: Budget,
    progress: RunProgress,
) -> StageReport:
    """Train the adapters that a survey found missing. Passages without an augmentation are not counted as taken.

    `take_survey` is called again if a part of the cluster is lost. `budget` limits the rejects; those that a survey
    found are counted too.
    """
    begun = time.perf_counter()
    store, recipe, profile, limits = context.store, context.recipe, context.profile, context.config.run
    stage_run = StageRun(store, context.run, "train", recipe.fingerprint, limits, limits.passage_timeout_s)

    def work(survey: Survey) -> Tally:
        total = survey.counts["to_train"]
        if not total:
            return Tally()
        missing = with_augmentations(store, survey, "to_train", passages, recipe.augment.fingerprint, profile)
        # Passages of like length share a batch: padding is computed like any token.
        missing = map_blocks(missing, with_length).sort("length")
        outcomes = run_actors(
            TrainAdapters,
            (context,),
            missing,
            # Actors that come later share what is left. By the most that may come, tasks would be small for all.
            passages_per_task(total, context, profile.train.that_fit()),
            profile.train,
            replace(stage_run, board=progress.board),
            preload=["prag_core.training.trainer"],
            lanes=LANES,
        )
        return follow_outcomes(outcomes, total, "train", progress, budget.after(survey.rejected))

    last, tally = resume_until_done("train", "to_train", first, take_survey, work, progress)
    return StageReport(
        stage="train",
        taken=last.augmented,
        done=last.counts["done"] + tally.done,
        earlier=first.counts["done"],
        rejected=dict(last.reasons["train_rejected"] + tally.rejected),
        seconds=time.perf_counter() - begun,
        bytes=tally.bytes,
    )


def with_length(table: pa.Table) -> pa.Table:
    """Append the column `length`: the characters of a passage and its rewrites."""
    rewrites = pc.binary_join(table["rewrites"], "")
    return table.append_column("length", pc.add(pc.utf8_length(table["text"]), pc.utf8_length(rewrites)))
