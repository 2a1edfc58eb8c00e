"""The evaluation on Ray: retrieve, train the task adapters, ask what has not been asked, and give back all of it.

Answers are stored as they are made, by what was asked: an evaluation that was killed, or that gets another mode or
control, asks only for what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, get_args

import pyarrow as pa
import ray.data
import safetensors.torch
from rich.console import Console

from cluster.resources import Profile
from cluster.session import ray_session
from pipelines import evaluation_data as data
from pipelines.outcomes import Outcome, Tally, outcome_blocks, outcome_table
from pipelines.profiles import profile_of
from pipelines.progress import stage_progress
from pipelines.tables import set_threads
from prag_core.adapter_io import pack_shard
from prag_core.adapter_store import LedgerSource, get_start, open_adapters
from prag_core.config import Config
from prag_core.controls import ControlSource, task_job, task_sets
from prag_core.datasets import Question, match_gold
from prag_core.engine import Engine, Request
from prag_core.errors import AdapterError, InputError, StoreError
from prag_core.evaluate import (
    EVALUATION_VERSION,
    Ask,
    Context,
    EvaluationPlan,
    Reply,
    columns,
    draw,
    make_ask,
)
from prag_core.examples import training_examples
from prag_core.forgetting import forgotten_keys
from prag_core.identity import fingerprint
from prag_core.layout import LoraLayout
from prag_core.lora import Factors, check_factors
from prag_core.models import load_base_model
from prag_core.opened import open_reader
from prag_core.prepare import Preparation
from prag_core.recipe import Recipe
from prag_core.records import MODES, Answer, Augmentation, Hit, Passage, Weights, from_table, to_table
from prag_core.snapshot import Snapshot, check_base_model, load_snapshot
from prag_core.store import Store, open_store
from prag_core.summary import Evaluation
from prag_core.trainer import Trainer

# Keys from which wrong and task adapters are drawn.
_POOL = 2000
# Each holds a JVM and answers hundreds of questions a second.
_SEARCHERS = 4
# Requests that the driver holds at a time, with the texts of their passages.
_ASKS_AT_ONCE = 20_000


def run_evaluation(
    config: Config,
    questions: Sequence[Question],
    plan: EvaluationPlan,
    console: Console,
    *,
    snapshot_id: str | None = None,
    limit: int | None = None,
) -> Evaluation:
    """Ask every question as the plan says, on a snapshot of the configured store.

    Questions whose gold passages are named, but not in the corpus, are left out, and with `retrieval: oracle` all
    without gold passages; the result counts them. Of the rest, `limit` are drawn at random, the same each time.

    Raises:
        StoreError: when nothing is published, or the snapshot is another base model's.
        InputError: when no question is left, or a control has too few passages.
    """
    store = open_store(config)
    snapshot = load_snapshot(store, snapshot_id)
    adapters, _ = open_adapters(store, snapshot.recipe)
    profile = profile_of(config)
    if open_reader(store, config, adapters.layout) is not None:
        plan = replace(plan, reader=f"{config.answer.reader} x{config.answer.reader_strength:g}")
    wanted = columns(plan)
    with ray_session(profile):
        # 1. The gold passages, and which questions can be asked.
        console.print(f"evaluate: snapshot {snapshot.id}, {len(questions)} questions; looking for their passages")
        gold = match_gold(questions, data.find_gold(store, snapshot, questions, profile.partitions))
        asked, left_out = _choose(questions, gold, plan, limit)
        # 2. Retrieval; with the gold passages given it serves the control `wrong`.
        found = data.retrieve(config, store, snapshot, asked, plan.depth, min(profile.model_actors.most, _SEARCHERS))
        contexts = [
            Context(ranked=row.hits, gold=gold[q.id], trained=frozenset(), pool=(), augmentations={}, tasks=())
            for row, q in zip(found, asked, strict=True)
        ]
        contexts = _complete(config, store, snapshot, adapters.recipe, plan, contexts, profile, console)
        # 3. Ask.
        folder = evaluation_folder(config, store, snapshot)
        asks: dict[str, list[list[str]]] = {}
        pending: dict[str, Ask] = {}
        replies = _stored(store, folder)
        for column in wanted:
            asks[column.name] = []
            for question, context in zip(asked, contexts, strict=True):
                made = [make_ask(question, column, seed, context, plan) for seed in column.seeds]
                asks[column.name].append([ask.id for ask in made])
                pending.update({ask.id: ask for ask in made if ask.id not in replies})
            if len(pending) >= _ASKS_AT_ONCE or column is wanted[-1]:
                _ask(config, store, snapshot, folder, list(pending.values()), profile, console)
                pending = {}
                replies = _stored(store, folder)
    return Evaluation(
        origin=_origin(snapshot, adapters.recipe),
        plan=plan,
        questions=tuple(asked),
        left_out=left_out,
        columns=tuple(wanted),
        gold=tuple(tuple(passage.key for passage in context.gold) for context in contexts),
        retrieved=tuple(tuple(hit.passage.key for hit in context.ranked) for context in contexts),
        retrieve_ms=tuple(row.retrieve_ms for row in found),
        asks=asks,
        replies={id: replies[id] for ids in asks.values() for of in ids for id in of},
    )


def _origin(snapshot: Snapshot, recipe: Recipe) -> dict[str, Any]:
    told = asdict(snapshot)
    named = ("id", "corpus_version", "index", "base_model", "passages", "adapters")
    return {
        "snapshot": {name: told[name] for name in named},
        "recipe": {"fingerprint": recipe.fingerprint, **recipe.to_json()},
    }


def evaluation_folder(config: Config, store: Store, snapshot: Snapshot) -> str:
    """Return the folder of the answers that are comparable with each other, and describe it beside them."""
    about = {
        "version": EVALUATION_VERSION,
        "base_model": snapshot.base_model,
        "recipe": snapshot.recipe,
        "ledger_parts": snapshot.ledger_parts,
        "max_new_tokens": config.answer.max_new_tokens,
    }
    folder = f"evaluations/{fingerprint(about)}"
    if not store.exists(f"{folder}/about.json"):
        store.put_json(f"{folder}/about.json", about)
    return folder


def _choose(
    questions: Sequence[Question], gold: dict[str, tuple[Passage, ...]], plan: EvaluationPlan, limit: int | None
) -> tuple[list[Question], dict[str, int]]:
    absent = [q for q in questions if q.gold and not gold[q.id]]
    silent = [q for q in questions if not q.gold] if plan.retrieval == "oracle" else []
    ids = {q.id for q in [*absent, *silent]}
    left = [q for q in questions if q.id not in ids]
    if not left:
        raise InputError(
            "no question is left: none has a gold passage in this snapshot's corpus",
            "evaluate on the corpus that the questions are about" + (", or use --retrieval bm25" if silent else ""),
        )
    chosen = draw(left, limit)
    counts = {"not_in_corpus": len(absent), "no_gold": len(silent), "over_limit": len(left) - len(chosen)}
    return chosen, {reason: n for reason, n in counts.items() if n}


def _complete(
    config: Config,
    store: Store,
    snapshot: Snapshot,
    recipe: Recipe,
    plan: EvaluationPlan,
    contexts: list[Context],
    profile: Profile,
    console: Console,
) -> list[Context]:
    """Add to each question's context what the controls need, and make the task adapters."""
    if not plan.controls:
        return contexts
    k = max(plan.top_k)
    asked = {hit.passage.key for context in contexts for hit in context.ranked}
    asked |= {passage.key for context in contexts for passage in context.gold}
    trained, pool = data.trained_keys(store, snapshot, asked, _POOL, profile.partitions)
    used = {hit.passage.key for context in contexts for hit in context.ranked[:k]}
    used |= {passage.key for context in contexts for passage in context.gold}
    augmentations: dict[str, Augmentation] = {}
    if "da" in plan.controls:
        augmentations = data.find_augmentations(store, recipe.augment.fingerprint, used, profile.partitions)
    tasks: list[tuple[str, ...]] = [() for _ in contexts]
    if "task" in plan.controls:
        tasks = _train_tasks(config, store, snapshot, recipe, plan, contexts, pool, profile, console)
    return [
        replace(context, trained=trained, pool=pool, augmentations=augmentations, tasks=of)
        for context, of in zip(contexts, tasks, strict=True)
    ]


def _train_tasks(
    config: Config,
    store: Store,
    snapshot: Snapshot,
    recipe: Recipe,
    plan: EvaluationPlan,
    contexts: list[Context],
    pool: list[str],
    profile: Profile,
    console: Console,
) -> list[tuple[str, ...]]:
    """Train the task adapters that are not there; return for each question the name of its own of each seed."""
    # 1. Which passages, of each seed.
    k = max(plan.top_k)
    related = [
        {hit.passage.key for hit in context.ranked[:k]} | {passage.key for passage in context.gold}
        for context in contexts
    ]
    chosen = [task_sets(pool, related, plan.task_passages, seed) for seed in range(plan.seeds)]
    used = {of[i] for of, numbers in chosen for i in numbers}
    # 2. Their texts.
    keys = {key for keys in used for key in keys}
    passages = {p.key: p for p in data.find_passages(store, snapshot, keys, profile.partitions)}
    augmentations = data.find_augmentations(store, recipe.augment.fingerprint, keys, profile.partitions)
    lost = keys - (passages.keys() & augmentations.keys())
    if lost:
        raise StoreError(
            f"store = {store.url!r}: {len(lost)} passages with an adapter lack their text or augmentation",
            "run `prag run` again",
        )
    # 3. What is not there yet.
    names = {of: fingerprint([plan.task_rounds, [[key, augmentations[key].digest] for key in of]]) for of in used}
    folder = evaluation_folder(config, store, snapshot)
    missing = [of for of in sorted(used) if not store.exists(_task_object(folder, names[of]))]
    if missing:
        rows = [{"name": names[of], "keys": list(of)} for of in missing]
        texts = {key: (passages[key], augmentations[key]) for of in missing for key in of}
        arguments = (config, store, recipe, folder, texts, plan.task_rounds, profile)
        made = ray.data.from_items(rows)
        tally = _work(TrainTasks, arguments, made, len(rows), config.run.train_batch, "task", profile, console)
        if tally.rejected:
            raise AdapterError(f"task adapters: {dict(tally.rejected)}", "see what training says of these passages")
    return [tuple(names[of[numbers[i]]] for of, numbers in chosen) for i in range(len(contexts))]


def _task_object(folder: str, name: str) -> str:
    return f"{folder}/tasks/{name}.safetensors"


class TrainTasks:
    """The actor that trains task adapters, each on examples of several passages."""

    def __init__(
        self,
        config: Config,
        store: Store,
        recipe: Recipe,
        folder: str,
        texts: dict[str, tuple[Passage, Augmentation]],
        rounds: int,
        profile: Profile,
    ) -> None:
        set_threads(profile.model_actors.threads)
        base = load_base_model(config.model, expected=recipe.base_model)
        start = get_start(store, recipe.train.start) if recipe.train.start else None
        self._trainer = Trainer(base, recipe.train, start)
        self._tokenizer = base.tokenizer
        self._recipe = recipe
        self._store = store
        self._folder = folder
        self._texts = texts
        self._rounds = rounds
        self._tokens_per_step = config.run.tokens_per_step or profile.tokens_per_step

    def __call__(self, table: pa.Table) -> pa.Table:
        """Train some task adapters and store each; give back one outcome each."""
        jobs = []
        for row in table.to_pylist():
            examples = [
                training_examples(self._tokenizer, *self._texts[key], self._recipe.train) for key in row["keys"]
            ]
            jobs.append(task_job(row["name"], [of for of in examples if of], self._rounds))
        outcomes = []
        for trained in self._trainer.train(jobs, tokens_per_step=self._tokens_per_step):
            if trained.factors is not None:
                shard, _ = pack_shard(self._trainer.layout, [("task", trained.factors)], "float32", {})
                self._store.put(_task_object(self._folder, trained.key), shard)
            outcomes.append(Outcome(trained.key, rejected=trained.failure))
        return outcome_table(outcomes)


def _read_task(store: Store, folder: str, layout: LoraLayout, name: str) -> Factors:
    try:
        tensors = safetensors.torch.load(store.get(_task_object(folder, name)))
    except (StoreError, safetensors.SafetensorError) as error:
        raise AdapterError(f"task adapter {name}: {error}", "remove it and evaluate again") from None
    factors = {key.removeprefix("task/"): tensor for key, tensor in tensors.items()}
    check_factors(layout, factors, name)
    return factors


def _work(
    actor: type,
    arguments: tuple[Any, ...],
    rows: ray.data.Dataset,
    total: int,
    batch: int,
    stage: str,
    profile: Profile,
    console: Console,
) -> Tally:
    """Have a pool of actors work on `rows`, a block of `batch` at a time, and show how it goes."""
    outcomes = rows.repartition(target_num_rows_per_block=batch, strict=True).map_batches(
        actor,
        batch_size=batch,
        batch_format="pyarrow",
        fn_constructor_args=arguments,
        **profile.model_actors.pool(),
    )
    tally = Tally()
    with stage_progress(console, stage, total, "rows") as advance:
        for block in outcome_blocks(outcomes):
            for outcome in block:
                tally.add(outcome)
            advance(tally.done, sum(tally.rejected.values()))
    return tally


# ---- asking


def _ask(
    config: Config,
    store: Store,
    snapshot: Snapshot,
    folder: str,
    asks: list[Ask],
    profile: Profile,
    console: Console,
) -> None:
    if not asks:
        return
    arguments = (config, store, snapshot, folder, profile)
    rows = ray.data.from_arrow(to_table(Ask, asks))
    _work(AnswerAsks, arguments, rows, len(asks), 2 * config.answer.batch_size, "ask", profile, console)


def _stored(store: Store, folder: str) -> dict[str, Reply]:
    parts = store.list(f"{folder}/replies", ".parquet")
    return {reply.id: reply for reply in from_table(Reply, store.get_table(Reply, parts))}


class _NoRetriever:
    """Every request brings its passages."""

    def search(self, question: str, top_k: int, min_score: float = 0.0) -> list[Hit]:
        raise AssertionError("a request without passages was asked")


class AnswerAsks:
    """The actor that answers: holds the engine, and stores what it answered before it reports it."""

    def __init__(self, config: Config, store: Store, snapshot: Snapshot, folder: str, profile: Profile) -> None:
        set_threads(profile.model_actors.threads)
        base = load_base_model(config.model)
        check_base_model(snapshot, store, config.model.name, base.fingerprint)
        adapters, train = open_adapters(store, snapshot.recipe)
        layout = adapters.layout
        source = ControlSource(
            LedgerSource(adapters, snapshot.ledger_parts), layout, lambda name: _read_task(store, folder, layout, name)
        )
        self._engine = Engine(
            base,
            train,
            Preparation(
                base,
                _NoRetriever(),
                template=train.template,
                snapshot=snapshot.id,
                max_new_tokens=config.answer.max_new_tokens,
                reader=open_reader(store, config, layout),
                hidden=forgotten_keys(store, snapshot),
            ),
            source,
            batch_size=config.answer.batch_size,
        )
        self._store = store
        self._folder = folder

    def __call__(self, table: pa.Table) -> pa.Table:
        """Answer a batch; give back one outcome each."""
        asks = from_table(Ask, table)
        answers = self._engine.answer_batch([_request(ask) for ask in asks])
        replies = [_reply(ask, answer) for ask, answer in zip(asks, answers, strict=True)]
        self._store.put_table(f"{self._folder}/replies", to_table(Reply, replies))
        return outcome_table([Outcome(reply.id) for reply in replies])


def _request(ask: Ask) -> Request:
    # As the plan named them, narrowed again: Arrow knows texts alone.
    mode = next(mode for mode in MODES if mode == ask.mode)
    weights: Weights = next(weights for weights in get_args(Weights) if weights == ask.weights)
    return Request(ask.question, mode, max(1, len(ask.hits)), weights, ask.hits, ask.strength)


def _reply(ask: Ask, answer: Answer) -> Reply:
    if answer.error:
        return Reply(ask.id, "", "", 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, failed=answer.error)
    ms = answer.milliseconds
    return Reply(
        id=ask.id,
        text=answer.text,
        reasoning=answer.reasoning,
        prompt_tokens=answer.prompt_tokens,
        new_tokens=answer.new_tokens,
        fetch_ms=ms["fetch"],
        prompt_ms=ms["prompt"],
        inject_ms=ms["inject"],
        prefill_ms=ms["prefill"],
        decode_ms=ms["decode"],
        notes=tuple(passage.note for passage in answer.passages if passage.note),
    )
