"""Streaming an answer's text in pieces while it is generated, without ever changing a piece that was sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prag_core.llm.decode_request import DecodeRequest
from prag_core.prompts import final_answer, reasons
from prag_core.records import Template


class StreamingDetokenizer:
    """Turns the growing tokens of one answer into pieces of its text.

    Text that may still change is held back: an incomplete character, white space and full stops at the end (which the
    answer does not keep), and the beginning of a stop text. Where the template lets the model reason first, all text
    is held back until the end.

    Args:
        tokenizer: The model's tokenizer.
        request: What is decoded; it says where the answer ends.
        template: How the question was asked.
    """

    def __init__(self, tokenizer: Any, request: DecodeRequest, template: Template = "direct") -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._template = template
        self._sent = ""

    def add(self, tokens: Sequence[int]) -> str:
        """Return the new text that will not change any more, given all tokens so far; it may be empty."""
        if reasons(self._template):
            return ""
        text = self._tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")
        text = self._request.until_stop(text)
        held = max((_overlap(text, stop) for stop in self._request.stop_strings), default=0)
        return self._send(final_answer(text[: len(text) - held]))

    def end(self, text: str) -> str:
        """Return the last piece, given the whole answer's text."""
        return self._send(text)

    def _send(self, text: str) -> str:
        if not text.startswith(self._sent):
            return ""
        piece = text[len(self._sent) :]
        self._sent = text
        return piece


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((length for length in range(len(stop) - 1, 0, -1) if text.endswith(stop[:length])), 0)
