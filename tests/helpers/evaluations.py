"""An invented evaluation and its report, and the replies that a real one stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prag_core.data.questions import Question
from prag_core.evaluation.plan import (
    EvaluationPlan,
    EvaluationReply,
    columns,
)
from prag_core.evaluation.summary import Evaluation, summarize
from prag_core.records import from_table
from prag_core.store.objects import Store


def evaluation() -> Evaluation:
    """Four questions about two passages: prag answers three, closed one; under `random` one seed of two answers."""
    plan = EvaluationPlan(modes=("closed", "prag"), controls=("random",), top_k=(1,), seeds=2)
    questions = tuple(
        Question(f"q{i}", f"Question {i} <b>?", (f"answer {i}", "alias"), ("even", "odd")[i % 2]) for i in range(4)
    )
    texts = {
        "closed": [["answer 0"], ["wrong"], ["wrong"], ["answer"]],
        "prag": [["answer 0"], ["alias."], ["answer 2"], ["wrong"]],
        "random": [["wrong", "answer 0"], ["no", "no"], ["no", "no"], ["no", "no"]],
    }
    request_ids = {
        name: [[f"{name}-{i}-{j}" for j in range(len(row))] for i, row in enumerate(rows)]
        for name, rows in texts.items()
    }
    replies = {
        request_ids[name][i][j]: EvaluationReply(request_ids[name][i][j], text, "", 50, 3, 1.0, 0.5, 2.0, 30.0, 60.0)
        for name, rows in texts.items()
        for i, row in enumerate(rows)
        for j, text in enumerate(row)
    }
    replies["prag-3-0"] = replace(replies["prag-3-0"], notes=("adapter k: cut short",))
    return Evaluation(
        origin={"snapshot": {"id": "20260101T000000-ab"}, "recipe": {"fingerprint": "ab", "train": {"name": "recall"}}},
        plan=plan,
        questions=questions,
        left_out={"no_gold": 2},
        columns=tuple(columns(plan)),
        gold=(("a",), ("a",), ("b", "c"), ("b", "c")),
        retrieved=(("a", "x"), ("x", "a"), ("b", "x"), ("x", "y")),
        retrieve_ms=(4.0, 4.0, 4.0, 8.0),
        request_ids=request_ids,
        replies=replies,
    )


def report() -> dict:
    return summarize(evaluation(), {"name": "invented", "questions": 6}, "prag evaluate --dataset invented")


def replies(folder: Path) -> list[EvaluationReply]:
    store = Store(str(folder / "store"))
    found = from_table(EvaluationReply, store.get_table(EvaluationReply, store.list("evaluations", ".parquet")))
    return sorted(found, key=lambda reply: reply.id)
