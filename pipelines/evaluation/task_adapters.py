"""Task adapters, a control of an evaluation: each is trained on passages that are not related to its questions."""

from __future__ import annotations

import pyarrow as pa
import ray.data
from rich.console import Console

from pipelines.evaluation.stored import evaluation_folder, task_adapter_name
from pipelines.execution.lookup import find_augmentations, find_passages
from pipelines.execution.outcomes import Outcome, outcome_table
from pipelines.execution.progress import run_pool
from pipelines.settings import RunContext
from prag_core.errors import AdapterError, StoreError
from prag_core.evaluation.controls import task_job, task_sets
from prag_core.evaluation.plan import EvaluationPlan
from prag_core.evaluation.requests import QuestionContext
from prag_core.identity import fingerprint
from prag_core.llm.base_model import load_base_model
from prag_core.llm.threads import compute_here
from prag_core.records import Augmentation, Passage
from prag_core.store.adapters import get_start
from prag_core.store.shard_codec import pack_shard
from prag_core.store.snapshot import Snapshot
from prag_core.training.examples import training_examples
from prag_core.training.trainer import Trainer


def train_task_adapters(
    run_context: RunContext,
    snapshot: Snapshot,
    plan: EvaluationPlan,
    contexts: list[QuestionContext],
    pool: list[str],
    console: Console,
) -> list[tuple[str, ...]]:
    """Train the task adapters that the store lacks; return the names of each question's task adapters, one a seed.

    Raises:
        InputError: when `pool` is too small.
        StoreError: when a passage's text or augmentation is missing.
        AdapterError: when a task adapter could not be trained.
    """
    config, store, partitions = run_context.config, run_context.store, run_context.profile.partitions
    # 1. For each seed, choose sets of passages, and a set for each question.
    k = max(plan.top_k)
    related = [
        {hit.passage.key for hit in context.ranked[:k]} | {passage.key for passage in context.gold}
        for context in contexts
    ]
    chosen = [task_sets(pool, related, plan.task_passages, seed) for seed in range(plan.seeds)]
    used = {sets[position] for sets, positions in chosen for position in positions}
    # 2. Read their texts.
    keys = {key for keys in used for key in keys}
    passages = {p.key: p for p in find_passages(store, snapshot, keys, partitions)}
    augmentations = find_augmentations(store, run_context.recipe.augment.fingerprint, keys, partitions)
    lost = keys - (passages.keys() & augmentations.keys())
    if lost:
        raise StoreError(
            f"store = {store.url!r}: {len(lost)} passages with an adapter lack their text or augmentation",
            "run `prag run` again",
        )
    # 3. Train those that are missing. A name depends on all that decides the task adapter.
    names = {keys: fingerprint([plan.task_rounds, [[key, augmentations[key].digest] for key in keys]]) for keys in used}
    folder = evaluation_folder(config, store, snapshot)
    missing = [keys for keys in sorted(used) if not store.exists(task_adapter_name(folder, names[keys]))]
    if missing:
        rows = [{"name": names[keys], "keys": list(keys)} for keys in missing]
        texts = {key: (passages[key], augmentations[key]) for keys in missing for key in keys}
        tally = run_pool(
            TrainTasks,
            (run_context, folder, texts, plan.task_rounds),
            ray.data.from_items(rows),
            total=len(rows),
            batch=config.run.train_batch,
            stage="task",
            actors=run_context.profile.train,
            console=console,
        )
        if tally.rejected:
            raise AdapterError(f"task adapters: {dict(tally.rejected)}", "leave the control `task` out")
    return [tuple(names[sets[positions[i]]] for sets, positions in chosen) for i in range(len(contexts))]


class TrainTasks:
    """The actor that trains task adapters, each on examples of several passages."""

    def __init__(
        self, run_context: RunContext, folder: str, texts: dict[str, tuple[Passage, Augmentation]], rounds: int
    ) -> None:
        compute_here(run_context.profile.train.threads)
        base = load_base_model(
            run_context.config.model, expected=run_context.recipe.base_model, gpus=run_context.profile.train.gpus
        )
        self._train, self._store = run_context.recipe.train, run_context.store
        start = get_start(self._store, self._train.start) if self._train.start else None
        self._trainer = Trainer(base, self._train, start)
        self._tokenizer = base.tokenizer
        self._folder = folder
        self._texts = texts
        self._rounds = rounds
        self._tokens_per_step = run_context.profile.tokens_per_step

    def __call__(self, table: pa.Table) -> pa.Table:
        """Train some task adapters and store them; return one outcome for each."""
        jobs = []
        outcomes = []
        for row in table.to_pylist():
            examples = [training_examples(self._tokenizer, *self._texts[key], self._train) for key in row["keys"]]
            if any(examples):
                jobs.append(task_job(row["name"], [passage for passage in examples if passage], self._rounds))
            else:
                outcomes.append(Outcome(row["name"], rejected="nothing_to_train"))
        for trained in self._trainer.train(jobs, tokens_per_step=self._tokens_per_step):
            if trained.factors is not None:
                shard, _ = pack_shard(self._trainer.layout, [("task", trained.factors)], "float32", {})
                self._store.put(task_adapter_name(self._folder, trained.key), shard)
            outcomes.append(Outcome(trained.key, rejected=trained.failure))
        return outcome_table(outcomes)
