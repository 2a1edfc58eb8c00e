"""From text to token ids, and the tokens that end a text: for training, answering, augmenting and judging alike.

Text that we did not write (passages, questions, answers, rewrites) may hold the characters of a control token. These
functions encode them as plain text: control tokens come from the chat template, or are added as ids.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from prag_core.errors import TurnsError
from prag_core.prompts import Role, answer_messages, answer_prefix, brief_text
from prag_core.records import Template

# A template that writes the text alone.
_TEXT_ALONE = "{{ messages[0]['content'] }}"
# Characters without a meaning of their own.
_PRIVATE_USE = re.compile("[\ue000-\uf8ff\U000f0000-\U0010ffff]")
# Settings by which the templates of models that can reason are told not to; other templates ignore them.
WITHOUT_REASONING: Mapping[str, bool] = {"enable_thinking": False, "thinking": False}


def mark_control_tokens(tokenizer: Any) -> None:
    """Tell a tokenizer which of its tokens are control tokens, besides its special tokens.

    They are the other added tokens that its chat template holds, and those of the form `<|…|>`, which a template may
    put together from parts. White space is never one: some tokenizers add tokens for it.
    """
    template = str(tokenizer.chat_template)
    known = tokenizer.chat_control_tokens or ()
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if not token.special)
    tokenizer.chat_control_tokens = [
        text
        for text in added
        if text in known or (text.strip() and (text in template or (text.startswith("<|") and text.endswith("|>"))))
    ]


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, without tokens around it. No control token comes from it.

    Raises:
        TurnsError: when the tokenizer cannot encode a control token's characters as plain text.
    """
    return _encode(tokenizer, [{"role": "user", "content": text}], chat_template=_TEXT_ALONE)


def texts_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return `text_ids` of each text. Together they take a tenth of the time.

    Raises:
        TurnsError: see `text_ids`.
    """
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    # Without a control token, and without the characters that transformers uses to mark them, the template writes the
    # text as it stands.
    added = tokenizer.added_tokens_decoder.keys()
    return [
        ids if added.isdisjoint(ids) and not _PRIVATE_USE.search(text) else text_ids(tokenizer, text)
        for text, ids in zip(texts, encoded, strict=True)
    ]


def document_ids(tokenizer: Any, text: str) -> list[int]:
    """Return `text_ids` with the token in front with which the model expects a text to begin, if it expects one."""
    return [*_begin_ids(tokenizer), *text_ids(tokenizer, text)]


def _begin_ids(tokenizer: Any) -> list[int]:
    special = set(tokenizer.all_special_ids)
    return [*itertools.takewhile(special.__contains__, tokenizer.encode("a"))]


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]], **settings: Any) -> list[int]:
    """Return the token ids of a chat that opens the assistant's turn; `settings` are the chat template's own.

    Only the template's own control tokens are encoded as such.

    Raises:
        TurnsError: see `question_ids`.
    """
    return _encode(tokenizer, messages, add_generation_prompt=True, **settings)


def question_ids(
    tokenizer: Any,
    question: str,
    passages: Sequence[str] = (),
    *,
    history: Sequence[tuple[Role, str]] = (),
    template: Template = "direct",
) -> list[int]:
    """Return the token ids of a prompt that asks a question and opens the assistant's turn, if there are turns.

    Training and answering both use it.

    Raises:
        TurnsError: when the template refuses the turns (some accept no system text), or the tokenizer would turn plain
            text into a special token.
    """
    if template == "brief" and not passages and not history:
        return document_ids(tokenizer, brief_text(question))
    return chat_ids(tokenizer, answer_messages(question, passages, history=history, template=template))


def questions_ids(tokenizer: Any, asked: Sequence[tuple[str, Sequence[str]]], *, template: Template) -> list[list[int]]:
    """Return `question_ids` of each question with its passages. Questions that are plain text are encoded together.

    Raises:
        TurnsError: see `question_ids`.
    """
    if template != "brief" or any(passages for _, passages in asked):
        return [question_ids(tokenizer, question, passages, template=template) for question, passages in asked]
    begin = _begin_ids(tokenizer)
    return [[*begin, *ids] for ids in texts_ids(tokenizer, [brief_text(question) for question, _ in asked])]


def answer_prefix_ids(tokenizer: Any, template: Template = "direct") -> list[int]:
    """Return the token ids of the words with which each answer in training begins."""
    return text_ids(tokenizer, answer_prefix(template))


def end_of_turn_id(tokenizer: Any) -> int | None:
    """Return the token that ends the assistant's turn; None when the tokenizer has none.

    It is the first control token that the chat template writes after the assistant's words. Many models end a document
    with another token, which counts only where the template writes nothing.
    """
    eos: int | None = tokenizer.eos_token_id
    words = "prag-end-of-turn"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": words}]
    try:
        written = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, ValueError):
        return eos
    _, found, rest = written.rpartition(words)
    tokens = tokenizer.added_tokens_decoder
    after = tokenizer.encode(rest, add_special_tokens=False) if found else []
    return next((id for id in after if id in tokens and tokens[id].content.strip()), eos)


def end_ids(tokenizer: Any, generation_config: Any) -> frozenset[int]:
    """Return all tokens that end a text: those of the generation config, the tokenizer's, and the template's."""
    ends = getattr(generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list | tuple) else [ends]
    return frozenset(id for id in (*ends, tokenizer.eos_token_id, end_of_turn_id(tokenizer)) if id is not None)


def _encode(tokenizer: Any, messages: Sequence[Mapping[str, str]], **settings: Any) -> list[int]:
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            messages, return_dict=False, sanitize_control_tokens=True, **settings
        )
    except TemplateError as error:
        raise TurnsError(
            f"the model's chat template refuses these turns: {error}",
            "leave out system texts, and let user and assistant alternate",
        ) from None
    except ValueError as error:
        raise TurnsError(
            f"the model's tokenizer cannot write a text without control tokens: {error}", "leave these characters out"
        ) from None
    return ids
