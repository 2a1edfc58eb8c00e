"""Every prompt in one place, used by augmenting, by training and by answering.

What a passage's adapter was trained on and what a question is asked with must be the same words, so both come
from `answer_messages`. The wording of the question prompt follows the paper's (section 3.2, direct template).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from prag_core.records import Passage

# Raised whenever a template's words change: it is part of every recipe.
PROMPT_VERSION = 1

Role = Literal["system", "user", "assistant"]

ANSWER_PREFIX = "The answer is"

_ANSWER = (
    "You should answer the question by referring to the knowledge provided below and integrating your own "
    "knowledge.\n{passages}\n\nQuestion: {question}"
)


def passage_text(passage: Passage) -> str:
    """Return a passage as prompts show it: its text, with the title before it unless it opens with it."""
    if not passage.title or passage.text.startswith(passage.title):
        return passage.text
    return f"{passage.title}\n{passage.text}"


def question_text(question: str) -> str:
    """Return a question as prompts show it: trimmed, with exactly one question mark at its end."""
    return question.strip().rstrip("?").rstrip() + "?"


def answer_messages(
    question: str, passages: Sequence[str] = (), history: Sequence[tuple[Role, str]] = ()
) -> list[dict[str, str]]:
    """Return the chat messages that ask a question, after the turns before it, with or without passages."""
    listed = "".join(f"Passage {i}: {text}\n" for i, text in enumerate(passages, start=1))
    asked = {"role": "user", "content": _ANSWER.format(passages=listed, question=question_text(question))}
    return [*({"role": role, "content": text} for role, text in history), asked]


def answer_target(answer: str) -> str:
    """Return the words with which the assistant gives `answer` in a training example."""
    answer = answer.strip()
    return f"{ANSWER_PREFIX} {answer}" + ("" if answer.endswith(".") else ".")
