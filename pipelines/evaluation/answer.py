"""Answers the requests of an evaluation on Ray, and stores each batch of replies before it is reported as done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pyarrow as pa
import ray.data
from rich.console import Console

from pipelines.evaluation.stored import read_task_adapter
from pipelines.execution.outcomes import Outcome, outcome_table
from pipelines.execution.progress import run_pool
from pipelines.settings import RunContext
from prag_core.evaluation.controls import ControlSource
from prag_core.evaluation.plan import EvaluationReply, EvaluationRequest
from prag_core.inference.engine import Engine
from prag_core.inference.loaded_snapshot import load_reader
from prag_core.inference.processor import RequestProcessor
from prag_core.inference.request import Request
from prag_core.llm.base_model import load_base_model
from prag_core.llm.threads import compute_here
from prag_core.records import MODES, Answer, MergeRule, from_table, to_table
from prag_core.store.adapters import LedgerSource, open_adapters
from prag_core.store.snapshot import Snapshot, check_base_model, forgotten_keys


def answer_requests(
    run_context: RunContext,
    snapshot: Snapshot,
    folder: str,
    requests: Sequence[EvaluationRequest],
    console: Console,
) -> None:
    """Answer the requests and store the replies in an evaluation folder."""
    if not requests:
        return
    run_pool(
        AnswerEvaluation,
        (run_context, snapshot, folder),
        ray.data.from_arrow(to_table(EvaluationRequest, requests)),
        total=len(requests),
        batch=2 * run_context.config.answer.batch_size,
        stage="ask",
        actors=run_context.profile.answer,
        console=console,
    )


class AnswerEvaluation:
    """The actor that answers requests: it holds the engine and stores the replies."""

    def __init__(self, run_context: RunContext, snapshot: Snapshot, folder: str) -> None:
        config, store = run_context.config, run_context.store
        compute_here(run_context.profile.answer.threads)
        base = load_base_model(config.model, gpus=run_context.profile.answer.gpus)
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
                None,  # every request brings its passages
                template=train.template,
                snapshot=snapshot.id,
                max_new_tokens=config.answer.max_new_tokens,
                reader=load_reader(base, store, config, layout),
                hidden=forgotten_keys(store, snapshot),
            ),
            source,
            batch_size=config.answer.batch_size,
        )
        self._store = store
        self._folder = folder

    def __call__(self, table: pa.Table) -> pa.Table:
        """Answer a batch of requests; return one outcome for each."""
        requests = from_table(EvaluationRequest, table)
        answers = self._engine.answer_batch([_engine_request(request) for request in requests])
        replies = [_reply(request.id, answer) for request, answer in zip(requests, answers, strict=True)]
        self._store.put_table(f"{self._folder}/replies", to_table(EvaluationReply, replies))
        return outcome_table([Outcome(reply.id) for reply in replies])


def _engine_request(request: EvaluationRequest) -> Request:
    # Arrow gives plain strings; narrow them to the literals that the plan had.
    mode = next(mode for mode in MODES if mode == request.mode)
    weights: MergeRule = next(weights for weights in get_args(MergeRule) if weights == request.weights)
    k, reader = max(1, len(request.hits)), bool(request.reader)
    return Request(request.question, mode, k, weights, request.hits, request.strength, reader=reader)


def _reply(id: str, answer: Answer) -> EvaluationReply:
    if answer.error:
        return EvaluationReply(id, failed=answer.error)
    ms = answer.milliseconds
    return EvaluationReply(
        id=id,
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
