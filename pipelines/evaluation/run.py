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
from rich.console import Console

from cluster.session import ray_session
from pipelines.evaluation.retrieve import retrieve, trained_keys
from pipelines.evaluation.stored import evaluation_folder, read_task_adapter, stored_replies
from pipelines.evaluation.task_adapters import train_task_adapters
from pipelines.execution.lookup import find_augmentations, find_gold
from pipelines.execution.outcomes import Outcome, outcome_table
from pipelines.execution.progress import run_pool
from pipelines.settings import RunContext, profile_of
from prag_core.config import Config
from prag_core.data.gold import match_gold
from prag_core.data.questions import Question
from prag_core.errors import InputError
from prag_core.evaluation.controls import ControlSource
from prag_core.evaluation.plan import (
    EvaluationPlan,
    EvaluationReply,
    EvaluationRequest,
    columns,
    draw,
)
from prag_core.evaluation.requests import QuestionContext, make_request
from prag_core.evaluation.summary import Evaluation
from prag_core.inference.engine import Engine
from prag_core.inference.loaded_snapshot import open_reader
from prag_core.inference.processor import RequestProcessor
from prag_core.inference.request import Request
from prag_core.llm.base_model import load_base_model
from prag_core.llm.threads import compute_here
from prag_core.recipe import Recipe
from prag_core.records import MODES, Answer, Augmentation, Hit, MergeRule, Passage, from_table, to_table
from prag_core.store.adapters import LedgerSource, open_adapters
from prag_core.store.objects import open_store
from prag_core.store.snapshot import Snapshot, check_base_model, forgotten_keys, load_snapshot

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
    run_context = RunContext(config, store, profile, adapters.recipe, adapters.layout)
    if open_reader(store, config, adapters.layout) is not None:
        plan = replace(plan, reader=f"{config.answer.reader} x{config.answer.reader_strength:g}")
    wanted = columns(plan)
    with ray_session(profile):
        # 1. The gold passages, and which questions can be asked.
        console.print(f"evaluate: snapshot {snapshot.id}, {len(questions)} questions; looking for their passages")
        gold = match_gold(questions, find_gold(store, snapshot, questions, profile.partitions))
        asked, left_out = _choose(questions, gold, plan, limit)
        # 2. Retrieval; with the gold passages given it serves the control `wrong`.
        found = retrieve(config, store, snapshot, asked, plan.depth, min(profile.model_actors.max_size, _SEARCHERS))
        contexts = [
            QuestionContext(ranked=row.hits, gold=gold[q.id], trained=frozenset(), pool=(), augmentations={}, tasks=())
            for row, q in zip(found, asked, strict=True)
        ]
        contexts = _complete(run_context, snapshot, plan, contexts, console)
        # 3. Ask.
        folder = evaluation_folder(config, store, snapshot)
        asks: dict[str, list[list[str]]] = {}
        pending: dict[str, EvaluationRequest] = {}
        replies = stored_replies(store, folder)
        for column in wanted:
            asks[column.name] = []
            for question, context in zip(asked, contexts, strict=True):
                made = [make_request(question, column, seed, context, plan) for seed in column.seeds]
                asks[column.name].append([ask.id for ask in made])
                pending.update({ask.id: ask for ask in made if ask.id not in replies})
            if len(pending) >= _ASKS_AT_ONCE or column is wanted[-1]:
                _answer_missing(run_context, snapshot, folder, list(pending.values()), console)
                pending = {}
                replies = stored_replies(store, folder)
    return Evaluation(
        origin=_origin(snapshot, adapters.recipe),
        plan=plan,
        questions=tuple(asked),
        left_out=left_out,
        columns=tuple(wanted),
        gold=tuple(tuple(passage.key for passage in context.gold) for context in contexts),
        retrieved=tuple(tuple(hit.passage.key for hit in context.ranked) for context in contexts),
        retrieve_ms=tuple(row.retrieve_ms for row in found),
        request_ids=asks,
        replies={id: replies[id] for ids in asks.values() for of in ids for id in of},
    )


def _origin(snapshot: Snapshot, recipe: Recipe) -> dict[str, Any]:
    told = asdict(snapshot)
    named = ("id", "corpus_version", "index", "base_model", "passages", "adapters")
    return {
        "snapshot": {name: told[name] for name in named},
        "recipe": {"fingerprint": recipe.fingerprint, **recipe.to_json()},
    }


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
    run_context: RunContext,
    snapshot: Snapshot,
    plan: EvaluationPlan,
    contexts: list[QuestionContext],
    console: Console,
) -> list[QuestionContext]:
    """Add to each question's context what the controls need, and make the task adapters."""
    if not plan.controls:
        return contexts
    store, partitions = run_context.store, run_context.profile.partitions
    k = max(plan.top_k)
    asked = {hit.passage.key for context in contexts for hit in context.ranked}
    asked |= {passage.key for context in contexts for passage in context.gold}
    trained, pool = trained_keys(store, snapshot, asked, _POOL, partitions)
    used = {hit.passage.key for context in contexts for hit in context.ranked[:k]}
    used |= {passage.key for context in contexts for passage in context.gold}
    augmentations: dict[str, Augmentation] = {}
    if "da" in plan.controls:
        augmentations = find_augmentations(store, run_context.recipe.augment.fingerprint, used, partitions)
    tasks: list[tuple[str, ...]] = [() for _ in contexts]
    if "task" in plan.controls:
        tasks = train_task_adapters(run_context, snapshot, plan, contexts, pool, console)
    return [
        replace(context, trained=trained, pool=pool, augmentations=augmentations, tasks=of)
        for context, of in zip(contexts, tasks, strict=True)
    ]


# ---- asking


def _answer_missing(
    run_context: RunContext, snapshot: Snapshot, folder: str, asks: list[EvaluationRequest], console: Console
) -> None:
    if not asks:
        return
    run_pool(
        AnswerEvaluation,
        (run_context, snapshot, folder),
        ray.data.from_arrow(to_table(EvaluationRequest, asks)),
        total=len(asks),
        batch=2 * run_context.config.answer.batch_size,
        stage="ask",
        actors=run_context.profile.model_actors,
        console=console,
    )


class _NoRetriever:
    """Every request brings its passages."""

    def search(self, question: str, top_k: int, min_score: float = 0.0) -> list[Hit]:
        raise AssertionError("a request without passages was asked")

    def close(self) -> None:
        """Do nothing: there is no index."""


class AnswerEvaluation:
    """The actor that answers: holds the engine, and stores what it answered before it reports it."""

    def __init__(self, run_context: RunContext, snapshot: Snapshot, folder: str) -> None:
        config, store = run_context.config, run_context.store
        compute_here(run_context.profile.model_actors.threads)
        base = load_base_model(config.model)
        check_base_model(snapshot, store, config.model.name, base.fingerprint)
        adapters, train = open_adapters(store, snapshot.recipe)
        layout = adapters.layout
        source = ControlSource(
            LedgerSource(adapters, snapshot.ledger_parts),
            layout,
            lambda name: read_task_adapter(store, folder, layout, name),
        )
        self._engine = Engine(
            base,
            train,
            RequestProcessor(
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
        asks = from_table(EvaluationRequest, table)
        answers = self._engine.answer_batch([_request(ask) for ask in asks])
        replies = [_reply(ask, answer) for ask, answer in zip(asks, answers, strict=True)]
        self._store.put_table(f"{self._folder}/replies", to_table(EvaluationReply, replies))
        return outcome_table([Outcome(reply.id) for reply in replies])


def _request(ask: EvaluationRequest) -> Request:
    # As the plan named them, narrowed again: Arrow knows texts alone.
    mode = next(mode for mode in MODES if mode == ask.mode)
    weights: MergeRule = next(weights for weights in get_args(MergeRule) if weights == ask.weights)
    return Request(ask.question, mode, max(1, len(ask.hits)), weights, ask.hits, ask.strength)


def _reply(ask: EvaluationRequest, answer: Answer) -> EvaluationReply:
    if answer.error:
        return EvaluationReply(ask.id, "", "", 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, failed=answer.error)
    ms = answer.milliseconds
    return EvaluationReply(
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
