"""Token ids of a question, as the model's chat template writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from prag_core.errors import TurnsError
from prag_core.prompts import Role, answer_messages, answer_prefix
from prag_core.records import Template


def question_ids(
    tokenizer: Any,
    question: str,
    passages: Sequence[str] = (),
    *,
    history: Sequence[tuple[Role, str]] = (),
    template: Template = "direct",
) -> list[int]:
    """Return the token ids of a prompt that asks a question and opens the assistant's turn.

    Training and answering both use it. Special tokens of the chat template that occur in a question, a passage or an
    earlier turn are encoded as plain text.

    Raises:
        TurnsError: when the template refuses the turns (some accept no system text), or the tokenizer would turn plain
            text into a special token.
    """
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            answer_messages(question, passages, history=history, template=template),
            add_generation_prompt=True,
            return_dict=False,
            sanitize_control_tokens=True,
        )
    except (TemplateError, ValueError) as error:
        raise TurnsError(
            f"the model's chat template refuses these turns: {error}",
            "leave out system texts, and let user and assistant alternate",
        ) from None
    return ids


def answer_prefix_ids(tokenizer: Any, template: Template = "direct") -> list[int]:
    """Return the token ids of the words with which each answer in training begins."""
    ids: list[int] = tokenizer.encode(answer_prefix(template), add_special_tokens=False)
    return ids
