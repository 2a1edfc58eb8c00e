"""A question as the token ids that the model's chat template makes of it."""

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
    """Return the token ids that ask a question and open the assistant's turn, as training and answering do.

    What looks like a token of the chat template in a question, a passage or an earlier turn is read as text.

    Raises:
        TurnsError: when the template refuses the turns (some know no system text), or the tokenizer makes a
            token of the template from plain text.
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
            f"the model's chat template cannot write this: {error}", "leave out system texts, or take turns"
        ) from None
    return ids


def answer_prefix_ids(tokenizer: Any, template: Template = "direct") -> list[int]:
    """Return the token ids of the words that each answer in training begins with."""
    ids: list[int] = tokenizer.encode(answer_prefix(template), add_special_tokens=False)
    return ids
