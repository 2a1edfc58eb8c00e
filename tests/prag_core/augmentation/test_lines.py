"""Replies of one pair a line: which lines hold a pair, and that no line is lost uncounted."""

from __future__ import annotations

import pytest

from prag_core.augmentation.augment import augment
from prag_core.augmentation.lines import parse_lines
from prag_core.identity import passage_key
from prag_core.recipe import AugmentRecipe
from prag_core.records import Augmentation, Passage
from prag_core.testing import ScriptedGenerator

TEXT = "The Zembla Tower is a stone beacon on Pelora. It was built in 1871 by Tadeo Quill, and it is 43 metres tall."
TOWER = Passage(passage_key("Zembla Tower", TEXT), "Zembla Tower", TEXT, ("tower",))
RECIPE = AugmentRecipe("scripted", "lines", pairs=9, rewrites=0, attempts=1, seed=0, imported=False)


@pytest.mark.parametrize(
    "line",
    [
        "Q: Who? | A: Quill",
        "1. **Q1: Who?** | **A1: Quill.**",
        "Question 1: Who?\nAnswer: Quill",
        "Q：Who? ｜ A：Quill",
        "Q: Who?\tA: Quill",
        "Q: Who? → A: Quill",
        "Q: Who? | A: Quill | Source: the passage",
        "Q: Who? | A: Quill\r",
    ],
)
def test_a_line_with_a_pair(line: str) -> None:
    assert [(pair.question, pair.answer) for pair in parse_lines(f"Here they are:\n{line}\n")] == [("Who?", "Quill")]


@pytest.mark.parametrize(
    ("more", "bad"), [("", None), ("\nQ: How tall is", 1), ("\nQ: What?\nQ: Where?", 2), ("\nI hope that helps.", None)]
)
def test_a_question_without_an_answer_is_counted(more: str, bad: int | None) -> None:
    reply = f"Q: Who built the Zembla Tower? | A: Tadeo Quill{more}"
    (made,) = augment([TOWER], ScriptedGenerator(lambda _: reply), RECIPE)
    assert isinstance(made, Augmentation)
    assert made.refused == ((f"bad_line={bad}",) if bad else ())


def test_a_line_of_the_reasoning_is_no_pair() -> None:
    reply = "<think>Q: Where is the tower? | A: Pelora\nHm?</think>Q: Who built the Zembla Tower? | A: Tadeo Quill"
    (made,) = augment([TOWER], ScriptedGenerator(lambda _: reply), RECIPE)
    assert isinstance(made, Augmentation)
    assert [pair.answer for pair in made.pairs] == ["Tadeo Quill"]
    assert made.refused == ()
