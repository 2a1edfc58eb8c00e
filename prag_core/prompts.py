"""The prompts of training and answering, and the form of answers.

An adapter must be trained with the same words with which questions are asked later, so both use `answer_messages`.
The question prompt is worded like the paper's (Su et al. 2025, section 3.2). A recipe names its template: `direct`
asks for the answer; `brief` is the same with passages or earlier turns, and otherwise the question as plain text, which
is a quarter of the tokens to train; `chain_of_thought` shows worked examples and lets the model reason first, as the
paper does for multi-hop questions. The prompts that augment passages are in `prag_core.augmentation.prompts`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from prag_core.records import Passage, QAPair, Template

# Raise it whenever the words of a prompt change. It is part of every recipe.
PROMPT_VERSION = 2

Role = Literal["system", "user", "assistant"]

_COLON = re.compile(r"^[\s:]+")
_LINE_ENDS = re.compile(r"\s*\n\s*")

ANSWER_PREFIX = "The answer is"
REASONING_PREFIX = "Answer:"

# Common knowledge, one example for each kind of multi-hop question: bridge, comparison, yes or no.
_WORKED = """\
Question: Which ocean washes the shore of the country whose capital is Lima?
Answer: Lima is the capital of Peru. Peru lies on the Pacific Ocean. So the answer is the Pacific Ocean.

Question: Who was born first, Isaac Newton or Albert Einstein?
Answer: Isaac Newton was born in 1643. Albert Einstein was born in 1879. So the answer is Isaac Newton.

Question: Do the rivers Danube and Rhine flow into the same sea?
Answer: The Danube flows into the Black Sea. The Rhine flows into the North Sea. So the answer is no.
"""

_ANSWER = (
    "You should answer the question by referring to the knowledge provided below and integrating your own "
    "knowledge.\n{passages}\n\nQuestion: {question}"
)

_BRIEF = "Question: {question}"

_REASON = (
    "Here are examples of how to answer questions:\n\n{worked}\n"
    "You should answer the question in the form of the examples, by referring to the knowledge provided below and "
    "integrating your own knowledge.\n{passages}\n\nQuestion: {question}"
)


def passage_text(passage: Passage) -> str:
    """Return a passage as prompts show it: the title and the text, or the text alone if it begins with the title."""
    if not passage.title or passage.text.startswith(passage.title):
        return passage.text
    return f"{passage.title}\n{passage.text}"


def question_text(question: str) -> str:
    """Return a question as prompts show it: trimmed, with exactly one question mark at its end."""
    return question.strip().rstrip("?").rstrip() + "?"


def answer_messages(
    question: str,
    passages: Sequence[str] = (),
    *,
    history: Sequence[tuple[Role, str]] = (),
    template: Template = "direct",
) -> list[dict[str, str]]:
    """Return the chat messages that ask a question, with or without passages, after the turns of `history`."""
    listed = "".join(f"Passage {i}: {text}\n" for i, text in enumerate(passages, start=1))
    words = _REASON if reasons(template) else _ANSWER if template == "direct" or passages else _BRIEF
    content = words.format(worked=_WORKED, passages=listed, question=question_text(question))
    return [*({"role": role, "content": text} for role, text in history), {"role": "user", "content": content}]


def brief_text(question: str) -> str:
    """Return the plain text that asks a question with the template `brief`: no chat template writes turns around it."""
    return f"{_BRIEF.format(question=question_text(question))}\n"


def reasons(template: Template) -> bool:
    """Return whether the template lets the model reason before it answers."""
    return template == "chain_of_thought"


def answer_prefix(template: Template = "direct") -> str:
    """Return the words with which each answer begins, in training and in answering."""
    return REASONING_PREFIX if reasons(template) else ANSWER_PREFIX


def answer_target(pair: QAPair, template: Template = "direct") -> str:
    """Return the assistant's answer to `pair` in a training example.

    With `chain_of_thought` it is the full answer as the reasoning, then the short answer as in the worked examples.
    """
    # On one line, because an answer ends at the end of its line.
    answer, full_answer = (_LINE_ENDS.sub(" ", text.strip()) for text in (pair.answer, pair.full_answer))
    if not reasons(template):
        return _sentence(f"{ANSWER_PREFIX} {answer}")
    last = _sentence(f"So the answer is {answer}")
    return f"{REASONING_PREFIX} {_sentence(full_answer)} {last}"


def final_answer(text: str, template: Template = "direct") -> str:
    """Return the short answer in a model's text; with `chain_of_thought`, the part after the last "the answer is".

    A model often goes on from "The answer is" with a colon, which is no part of its answer.
    """
    if reasons(template):
        text = re.split(r"(?i)\bthe answer is\b", text)[-1]
    return _COLON.sub("", text).rstrip().rstrip(".")


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."
