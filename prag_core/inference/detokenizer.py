"""Text as it is generated: pieces that together are the answer's text, never one that would be taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prag_core.prompts import final_answer
from prag_core.records import Template


class StreamingDetokenizer:
    """Turns the growing tokens of one answer into pieces of its text.

    What may still change is held back: half a character, white space and full stops at the end (an answer is trimmed
    of them), and the beginning of a stop text. Where the model reasons first, what the answer is is known at the end.

    Args:
        tokenizer: The model's.
        stop: The texts that end the answer.
        template: How the question was asked.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), template: Template = "direct") -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._template = template
        self._sent = ""

    def add(self, tokens: Sequence[int]) -> str:
        """Return the text that is new and certain, given all tokens so far; may be empty."""
        if self._template != "direct":
            return ""
        text = self._tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")
        for stop in self._stop:
            text = text.split(stop)[0]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        return self._send(final_answer(text[: len(text) - held]))

    def end(self, text: str) -> str:
        """Return what the pieces so far lack of the whole answer's text."""
        return self._send(text)

    def _send(self, text: str) -> str:
        if not text.startswith(self._sent):
            return ""
        piece = text[len(self._sent) :]
        self._sent = text
        return piece


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with, and is not the whole of it."""
    return next((length for length in range(len(stop) - 1, 0, -1) if text.endswith(stop[:length])), 0)
