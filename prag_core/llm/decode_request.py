"""The decoder's input and output: a prompt with its settings and adapters, and the text that continues it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prag_core.llm.lora import FlatAdapter

DecodeFinish = Literal["stop", "length", "not_finite"]

# Everything up to the end of the first line that has more than white space and colons.
_FIRST_LINE = re.compile(r"\A[\s:]*[^\n]*")


@dataclass(frozen=True)
class DecodeRequest:
    """A prompt to continue, and how.

    Args:
        prompt: Its token ids; at least one.
        max_new_tokens: The most tokens to generate; at least one.
        stop_ids: Tokens that end the continuation and are not part of it.
        stop_strings: Texts that end the continuation; it ends before the first of them.
        one_line: End the continuation with its first line. A line of white space and colons does not count: some models
            write a colon first, and their answer in the next line.
        temperature: 0 takes the most likely token each time.
        top_k: Sample from this many of the most likely tokens; 0 for all.
        top_p: Sample from the most likely tokens that together have this probability.
        seed: Sampling depends on the seed and the prompt only.
        adapters: (adapter, weight) pairs; their weighted sum is added to the model.

    Raises:
        ValueError: when the prompt is empty or a number is out of range.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    one_line: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    adapters: Sequence[tuple[FlatAdapter, float]] = ()

    def __post_init__(self) -> None:
        if not self.prompt or self.max_new_tokens < 1:
            raise ValueError(f"{len(self.prompt)} tokens to continue by {self.max_new_tokens}: both must be positive")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}: out of range")

    def until_stop(self, text: str) -> str:
        """Return a continuation up to where it ends: the whole text if it goes on."""
        for stop in self.stop_strings:
            text = text.split(stop)[0]
        if self.one_line and (line := _FIRST_LINE.match(text)):
            text = line.group()
        return text


@dataclass(frozen=True)
class Decoded:
    """The result of a request: all generated tokens, and their text up to where it ends.

    `finish` is `stop` (a stop token, a stop string or a line end), `length`, or `not_finite`: the logits were not
    finite. The times, in milliseconds, are those until a slot was free, for stacking the adapters and copying them into
    the slot, until the first token, and from there to the last. They include work for other rows in the same steps.
    """

    tokens: list[int]
    text: str
    finish: DecodeFinish
    wait_ms: float
    inject_ms: float
    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True)
class DecodeEvent:
    """What one step did for one request: its new token, if any, and its result when the request has ended."""

    id: int
    token: int | None
    result: Decoded | None = None
