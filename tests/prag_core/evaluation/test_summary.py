"""From replies to a report: scores, intervals, differences, types, examples."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prag_core.evaluation.summary import METRICS, summarize, summary_line
from tests.helpers.evaluations import evaluation, report


def test_the_summary() -> None:
    made = report()
    assert (made["dataset"]["asked"], made["dataset"]["left_out"]) == (4, {"no_gold": 2})
    prag, closed, drawn = (made["columns"][name] for name in ("prag", "closed", "random"))
    assert (prag["f1"], prag["em"], prag["contains"]) == (0.75, 0.75, 0.75)
    assert closed["f1"] == pytest.approx((1 + 2 / 3) / 4, abs=1e-4)
    assert drawn["f1"] == 0.5 / 4  # the mean of two draws
    assert prag["milliseconds"]["total"] == 5.0 + 1.0 + 0.5 + 2.0 + 30.0 + 60.0
    assert closed["milliseconds"]["retrieve"] == 0.0
    assert (prag["without_adapter"], closed["without_adapter"], prag["failed"]) == (1, 0, 0)
    # Two passages: F1 1 (a: 1, 1) and 0.5 (b: 1, 0).
    assert prag["f1_interval"] == [0.5, 1.0]
    difference = next(d for d in made["differences"] if (d["right"], d["metric"]) == ("closed", "f1"))
    # By question 0, 1, 1, -2/3; by passage 0.5 and 1/6.
    assert difference["mean"] == pytest.approx(1 / 3, abs=1e-4)
    assert (difference["low"], difference["high"]) == (pytest.approx(1 / 6, abs=1e-4), 0.5)
    # The fourth question's adapter was cut short: without it 0, 1, 1.
    kept = made["with_adapters"]
    assert (kept["n"], kept["f1"]) == (3, {"closed": 0.3333, "prag": 1.0, "random": 0.1667})
    difference = next(d for d in kept["differences"] if (d["right"], d["metric"]) == ("closed", "f1"))
    assert (difference["mean"], difference["low"], difference["high"]) == (0.6667, 0.5, 1.0)
    # The bare model with the passages in its prompt was not asked.
    assert made["rag_wrong"]["n"] == 0
    assert made["types"]["odd"]["f1"]["prag"] == 0.5
    assert made["types"]["even"] == {"n": 2, "f1": {"closed": 0.5, "prag": 1.0, "random": 0.25}}
    assert made["retrieval"]["recall"] == {"1": 0.375, "3": 0.625, "5": 0.625}
    assert made["retrieval"]["any"]["1"] == 0.5
    (examples,) = made["examples"]
    assert [e["question"] for e in examples["won"]] == ["Question 1 <b>?", "Question 2 <b>?"]
    assert [e["texts"]["closed"] for e in examples["lost"]] == ["answer"]


def test_the_questions_that_rag_answers_wrongly() -> None:
    plain = evaluation()
    columns = (*plain.columns, replace(plain.columns[0], name="rag", mode="rag"))
    asked = {**plain.request_ids, "rag": plain.request_ids["closed"]}
    made = summarize(replace(plain, columns=columns, request_ids=asked), {"name": "x"}, "")["rag_wrong"]
    # F1 of `closed` and so of `rag`: 1, 0, 0, 2/3.
    assert (made["n"], made["f1"]["rag"], made["f1"]["prag"]) == (2, 0.0, 1.0)


def test_the_last_line() -> None:
    line = summary_line(report())
    assert line["n"] == 4
    assert line["f1"] == {"closed": 0.4167, "prag": 0.75, "random": 0.125}
    assert line["delta"] == {"prag_closed": 0.3333, "prag_random": 0.625}
    assert line["ci"]["prag_closed"] == [0.1667, 0.5]


def test_chain_of_thought_is_cut_as_the_paper_does() -> None:
    plain = evaluation()
    reasoned = {
        id: replace(reply, reasoning=f"It is known, so the answer is {reply.text}, surely.")
        for id, reply in plain.replies.items()
    }
    made = summarize(replace(plain, replies=reasoned), {"name": "x"}, "")
    assert made["columns"]["prag"]["paper_f1"] == 0.75


def test_a_reply_that_failed_is_never_right() -> None:
    """Without articles "The" is an empty text, and so is the reply."""
    plain = evaluation()
    named = tuple(replace(question, answers=("The",)) for question in plain.questions)
    failed = {id: replace(reply, text="", failed="too long") for id, reply in plain.replies.items()}
    made = summarize(replace(plain, questions=named, replies=failed), {"name": "x"}, "")
    assert {made["columns"][name][metric] for name in ("prag", "closed") for metric in METRICS} == {0.0}
