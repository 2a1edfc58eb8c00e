"""A model as judge: its words are read strictly, and no answer is judged twice."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.evaluation.judge import judge
from prag_core.errors import GenerationError
from prag_core.evaluation.judge import judge_answers
from prag_core.evaluation.summary import summarize
from prag_core.store.objects import Store
from prag_core.testing import ScriptedGenerator
from tests.helpers.evaluations import evaluation


def test_yes_and_no() -> None:
    replies = {"Rome": "Yes.", "Milan": "no, it is another city", "roma": "**Yes**"}
    generator = ScriptedGenerator(
        lambda text: next(reply for given, reply in replies.items() if f"answer: {given}\n" in text)
    )
    rows = [("Where?", ("Rome", "Roma"), given) for given in ("Rome", "Milan", " ", "roma")]
    assert asyncio.run(judge_answers(generator, rows)) == [1.0, 0.0, 0.0, 1.0]
    assert len(generator.prompts) == 3
    assert "Accepted answers: Rome; Roma\n" in generator.prompts[0]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("`no`", 0.0), ("no…", 0.0), ("(yes)", 1.0), ("Answer: yes", 1.0), ('{"answer": "yes"}', 1.0), ("1. No", 0.0),
        ("```\nyes\n```", 1.0), ("Yes—it does", 1.0), ("<answer><|begin_of_box|>no<|end_of_box|></answer>", 0.0),
        ("yes, the same without a doubt", 1.0), ("Here is my thought process: no. Here is my response:\nyes", None),
        ("yes/no", None), ("Yes and no", None), ("Here is my thought process: yes", None), ("<think>yes", None),
        ("I would say that it is no", None),
    ],
)  # fmt: skip
def test_the_word_may_be_wrapped_but_not_guessed(reply: str, verdict: float | None) -> None:
    def asked() -> list[float]:
        return asyncio.run(judge_answers(ScriptedGenerator(lambda text: reply), [("q", ("a",), "b")]))

    if verdict is not None:
        assert asked() == [verdict]
        return
    with pytest.raises(GenerationError, match="neither yes nor no"):
        asked()


def test_a_judge_that_rambles_or_fails_is_no_judge() -> None:
    with pytest.raises(GenerationError, match="1 of 1 replies"):
        asyncio.run(judge_answers(ScriptedGenerator(lambda text: "I think so"), [("q", ("a",), "a")]))
    with pytest.raises(GenerationError, match="down"):
        asyncio.run(judge_answers(ScriptedGenerator(lambda text: GenerationError("down")), [("q", ("a",), "a")]))


def test_verdicts_are_stored_and_reported(tmp_path: Path) -> None:
    def lenient(text: str) -> str:
        return "yes" if "Given answer: wrong" in text else "no"

    store, console = Store(str(tmp_path)), Console(quiet=True)
    generator = ScriptedGenerator(lenient)
    judged = judge(store, "evaluations/x", evaluation(), generator, console)
    assert judged.scores("closed", "judge") == [0.0, 1.0, 1.0, 0.0]
    assert judged.scores("random", "judge") == [0.5, 0.0, 0.0, 0.0]
    # The same answer to the same question, by whichever column, is judged once.
    assert len(generator.prompts) == len(set(generator.prompts)) == 11
    again = ScriptedGenerator(lenient)
    assert judge(store, "evaluations/x", evaluation(), again, console) == judged
    assert again.prompts == []
    report = summarize(judged, {"name": "x"}, "")
    assert report["columns"]["closed"]["judge"] == 0.5
    assert "judge" not in summarize(evaluation(), {"name": "x"}, "")["columns"]["closed"]
