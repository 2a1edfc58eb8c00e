"""The evaluation on Ray: retrieve, train the task adapters, answer what has no stored reply, return everything.

Replies are stored as they are made, under the fingerprint of their request. So an evaluation that was killed, or that
gets another mode or control, only answers what is missing or has failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from cluster.session import ray_session
from pipelines.evaluation.answer import answer_requests
from pipelines.evaluation.retrieve import retrieve, trained_keys
from pipelines.evaluation.stored import evaluation_folder, stored_replies
from pipelines.evaluation.task_adapters import train_task_adapters
from pipelines.execution.lookup import find_augmentations, find_gold, find_passages
from pipelines.settings import RunContext, profile_of
from pipelines.words import counted
from prag_core.config import Config
from prag_core.data.gold import match_gold
from prag_core.data.questions import Question
from prag_core.errors import GenerationError, InputError
from prag_core.evaluation.plan import EvaluationPlan, EvaluationReply, EvaluationRequest, columns, draw
from prag_core.evaluation.requests import QuestionContext, make_request
from prag_core.evaluation.summary import Evaluation
from prag_core.inference.loaded_snapshot import open_reader
from prag_core.recipe import Recipe
from prag_core.records import Augmentation, Passage
from prag_core.store.adapters import open_adapters
from prag_core.store.objects import open_store
from prag_core.store.snapshot import Snapshot, load_snapshot

# How many keys the controls draw wrong passages and the passages of task adapters from.
_POOL = 2000
# How many actors search at most: each holds an index and answers hundreds of questions a second.
_SEARCHERS = 4
# How many requests the driver holds at a time, with the texts of their passages.
_REQUESTS_AT_ONCE = 20_000


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

    A question is left out if it names gold passages and the corpus has none of them. With `retrieval: oracle`, so are
    all questions without gold passages. The result counts them. Of the rest, at most `limit` are drawn at random, the
    same ones each time.

    Raises:
        StoreError: when nothing is published, or the snapshot was made with another base model.
        InputError: when no question is left, or a control has too few passages.
        GenerationError: when each request has failed.
    """
    store = open_store(config)
    snapshot = load_snapshot(store, snapshot_id)
    adapters, _ = open_adapters(store, snapshot.recipe)
    profile = profile_of(config)
    run_context = RunContext(config, store, profile, adapters.recipe, adapters.layout)
    if open_reader(store, config, adapters.layout) is not None:
        plan = replace(plan, reader=f"{config.answer.reader} x{config.answer.reader_strength:g}")
    plan = replace(plan, route=snapshot.route)
    wanted = columns(plan)
    with ray_session(profile):
        # 1. Find the gold passages, and choose the questions.
        console.print(
            f"evaluate: snapshot {snapshot.id}, {counted(len(questions), 'question')}; looking for their passages"
        )
        gold = match_gold(questions, find_gold(store, snapshot, questions, profile.partitions))
        asked, left_out = _choose(questions, gold, plan, limit)
        # 2. Retrieve passages. With an oracle, only the control `wrong` needs them.
        found = retrieve(config, store, snapshot, asked, plan.depth, min(profile.answer.max_size, _SEARCHERS))
        contexts = [QuestionContext(row.hits, gold[q.id]) for row, q in zip(found, asked, strict=True)]
        contexts = _complete(run_context, snapshot, plan, contexts, console)
        # 3. Answer the requests of each column that have no stored reply.
        folder = evaluation_folder(config, store, snapshot)
        request_ids: dict[str, list[list[str]]] = {}
        pending: dict[str, EvaluationRequest] = {}
        replies = stored_replies(store, folder)
        for column in wanted:
            request_ids[column.name] = []
            for question, context in zip(asked, contexts, strict=True):
                requests = [make_request(question, column, seed, context, plan) for seed in column.seeds]
                request_ids[column.name].append([request.id for request in requests])
                pending.update({r.id: r for r in requests if r.id not in replies or replies[r.id].failed})
            if len(pending) >= _REQUESTS_AT_ONCE or column is wanted[-1]:
                answer_requests(run_context, snapshot, folder, list(pending.values()), console)
                pending = {}
                replies = stored_replies(store, folder)
    used = {id: replies[id] for by_question in request_ids.values() for ids in by_question for id in ids}
    check_answered(list(used.values()))
    return Evaluation(
        origin=_origin(snapshot, adapters.recipe),
        plan=plan,
        questions=tuple(asked),
        left_out=left_out,
        columns=tuple(wanted),
        gold=tuple(tuple(passage.key for passage in context.gold) for context in contexts),
        retrieved=tuple(tuple(hit.passage.key for hit in context.ranked) for context in contexts),
        retrieve_ms=tuple(row.retrieve_ms for row in found),
        hit_scores=tuple(tuple(hit.score for hit in context.ranked) for context in contexts),
        request_ids=request_ids,
        replies=used,
    )


def check_answered(replies: Sequence[EvaluationReply]) -> None:
    """Check that some request was answered, so that the scores mean something.

    Raises:
        GenerationError: when each has failed.
    """
    if all(reply.failed for reply in replies):
        raise GenerationError(
            f"each of the {len(replies)} requests has failed, the first with: {replies[0].failed}",
            "remove the cause that it names, and evaluate again",
        )


def _origin(snapshot: Snapshot, recipe: Recipe) -> dict[str, Any]:
    names = ("id", "corpus_version", "index", "base_model", "passages", "adapters")
    return {
        "snapshot": {name: getattr(snapshot, name) for name in names},
        "recipe": {"fingerprint": recipe.fingerprint, **recipe.to_json()},
    }


def _choose(
    questions: Sequence[Question], gold: dict[str, tuple[Passage, ...]], plan: EvaluationPlan, limit: int | None
) -> tuple[list[Question], dict[str, int]]:
    """Return the questions to ask, and the numbers of the others by reason."""
    not_in_corpus = {q.id for q in questions if q.gold and not gold[q.id]}
    no_gold = {q.id for q in questions if not q.gold} if plan.retrieval == "oracle" else set()
    usable = [q for q in questions if q.id not in not_in_corpus | no_gold]
    if not usable:
        raise InputError(
            "no question is left: none has a gold passage in this snapshot's corpus",
            "evaluate on the corpus that the questions are about" + (", or use --retrieval bm25" if no_gold else ""),
        )
    chosen = draw(usable, limit)
    counts = {"not_in_corpus": len(not_in_corpus), "no_gold": len(no_gold), "over_limit": len(usable) - len(chosen)}
    return chosen, {reason: n for reason, n in counts.items() if n}


def _complete(
    run_context: RunContext,
    snapshot: Snapshot,
    plan: EvaluationPlan,
    contexts: list[QuestionContext],
    console: Console,
) -> list[QuestionContext]:
    """Add to each question's context what controls and `auto` need; train the task adapters that are missing."""
    if not plan.controls and "auto" not in plan.modes:
        return contexts
    store, partitions = run_context.store, run_context.profile.partitions
    k = max(plan.top_k)
    asked = {hit.passage.key for context in contexts for hit in context.ranked}
    asked |= {passage.key for context in contexts for passage in context.gold}
    trained, pool = trained_keys(store, snapshot, asked, _POOL, partitions)
    # The ledger keeps the adapters of passages that have left the corpus.
    pool = [passage.key for passage in find_passages(store, snapshot, pool, partitions)]
    used = {hit.passage.key for context in contexts for hit in context.ranked[:k]}
    used |= {passage.key for context in contexts for passage in context.gold}
    augmentations: dict[str, Augmentation] = {}
    if "da" in plan.controls:
        augmentations = find_augmentations(store, run_context.recipe.augment.fingerprint, used, partitions)
    tasks: list[tuple[str, ...]] = [() for _ in contexts]
    if "task" in plan.controls:
        tasks = train_task_adapters(run_context, snapshot, plan, contexts, pool, console)
    return [
        replace(context, trained=trained, pool=pool, augmentations=augmentations, tasks=names)
        for context, names in zip(contexts, tasks, strict=True)
    ]
