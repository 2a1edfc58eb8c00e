"""A question with its settings, as the engine and the service take it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from prag_core.prompts import Role
from prag_core.records import DEFAULT_TOP_K, DEFAULT_WEIGHTS, AskedMode, Hit, MergeRule


@dataclass(frozen=True)
class Request:
    """One question and how to answer it.

    Args:
        question: Any text. Special tokens of the chat template in it are plain text.
        mode: `closed`, `rag`, `prag` or `combine`, or `auto` to choose one of them by what the search finds.
        top_k: The most passages to use.
        weights: How to weigh the passages' adapters.
        hits: The passages, if the caller already has them (an oracle, an evaluation); by default they are retrieved.
        strength: The factor of the adapters' weights; None for 1, or in the mode `combine` for the configuration's
            `answer.combine_strength`.
        max_new_tokens: The most tokens of the answer; None for the configuration's `answer.max_new_tokens`.
        temperature: 0 takes the most likely token each time.
        top_p: Sample from the most likely tokens that together have this probability.
        seed: Sampling depends on the seed and the prompt only.
        stop: Texts that end the answer and are not part of it. The end of the turn or of the line always ends it.
        ignore_eos: Generate `max_new_tokens` tokens in any case; for measurements.
        min_score: Passages with lower scores are not used.
        history: The turns before the question, as (role, text); the roles are `system`, `user` and `assistant`.
        reader: Whether to add the configured reader, where a passage is in the prompt.
        access: The asker's access tags. A passage with tags is used only if the asker has one of them. None means that
            the asker may read everything (the command line, an evaluation); with an empty set, only public passages
            are used.

    Raises:
        ValueError: when a number is out of range or a role is unknown.
    """

    question: str
    mode: AskedMode = "combine"
    top_k: int = DEFAULT_TOP_K
    weights: MergeRule = DEFAULT_WEIGHTS
    hits: tuple[Hit, ...] | None = None
    strength: float | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_score: float = 0.0
    history: tuple[tuple[Role, str], ...] = ()
    reader: bool = True
    access: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(AskedMode):
            raise ValueError(f"mode {self.mode!r}: known are {', '.join(get_args(AskedMode))}")
        if self.weights not in get_args(MergeRule):
            raise ValueError(f"weights {self.weights!r}: known are {', '.join(get_args(MergeRule))}")
        if self.top_k < 1 or (self.max_new_tokens is not None and self.max_new_tokens < 1):
            raise ValueError(f"top_k {self.top_k}, max_new_tokens {self.max_new_tokens}: both must be positive")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature {self.temperature}, top_p {self.top_p}: out of range")
        if self.strength is not None and not 0 < self.strength < math.inf:
            raise ValueError(f"strength {self.strength}: must be positive and finite")
        if math.isnan(self.min_score):
            raise ValueError("min_score is not a number")
        if "" in self.stop:
            raise ValueError("an empty stop string would end every answer at once")
        if others := {role for role, _ in self.history} - set(get_args(Role)):
            raise ValueError(f"roles {sorted(others)}: known are {', '.join(get_args(Role))}")
