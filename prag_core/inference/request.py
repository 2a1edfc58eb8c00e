"""A question, and how it is to be answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from prag_core.prompts import Role
from prag_core.records import Hit, MergeRule, Mode


@dataclass(frozen=True)
class Request:
    """One question and how it is to be answered.

    Args:
        question: Any text. What looks like a token of the chat template in it is text.
        mode: `closed`, `rag`, `prag` or `combine`.
        top_k: The most passages to use.
        weights: How their adapters are added.
        hits: The retrieved passages when the caller has them already (an oracle, an evaluation); otherwise they
            are retrieved.
        strength: What the adapters' weights are multiplied by; None stands for 1, and in the mode `combine` for the
            configuration's `answer.combine_strength`.
        max_new_tokens: The most tokens of the answer; None stands for the configuration's `answer.max_new_tokens`.
        temperature: 0 takes the likeliest token each time.
        top_p: Draw among the likeliest tokens that together have this probability.
        seed: With the prompt it decides what is drawn.
        stop: Texts that end the answer and are not part of it, besides the end of the turn and of the line.
        ignore_eos: Go on to `max_new_tokens` whatever the model says; for measuring.
        min_score: Passages that score less are not used: nothing relevant means no adapter.
        history: The turns before the question, as (role, text); the roles are `system`, `user` and `assistant`.
        access: The access tags that the asker holds: passages with other tags alone are not seen. None stands for
            a caller who may read everything (the command line, an evaluation); the empty set sees what is public.

    Raises:
        ValueError: when a number is out of range, or a role is not one of these.
    """

    question: str
    mode: Mode = "combine"
    top_k: int = 3
    weights: MergeRule = "sum"
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
    access: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode) or self.weights not in get_args(MergeRule):
            raise ValueError(f"mode {self.mode!r}, weights {self.weights!r}: no such thing")
        if self.top_k < 1 or (self.max_new_tokens is not None and self.max_new_tokens < 1):
            raise ValueError(f"top_k {self.top_k}, max_new_tokens {self.max_new_tokens}: both must be positive")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature {self.temperature}, top_p {self.top_p}: out of range")
        if self.strength is not None and not self.strength > 0:
            raise ValueError(f"strength {self.strength}: must be positive")
        if "" in self.stop:
            raise ValueError("an empty stop string would end every answer at once")
        if others := {role for role, _ in self.history} - set(get_args(Role)):
            raise ValueError(f"roles {sorted(others)}: known are {', '.join(get_args(Role))}")

    @property
    def updates(self) -> bool:
        """Whether passages go into the weights."""
        return self.mode in ("prag", "combine")
