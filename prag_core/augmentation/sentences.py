"""A passage's sentences and its topic, as the augmenting rules and small models read them."""

from __future__ import annotations

from prag_core.data.chunking import split_sentences
from prag_core.records import Passage

_SENTENCE_WORDS = 45


def topic_of(passage: Passage) -> str:
    """Return the topic of a passage: its title, or its first words."""
    return passage.title or " ".join(passage.text.split()[:4])


def sentences_of(passage: Passage) -> list[str]:
    """Return the sentences of a passage; a long one is cut at a comma near its middle, or in the middle."""
    return [piece for sentence in split_sentences(passage.text) for piece in _cut(sentence) if piece]


def _cut(sentence: str) -> list[str]:
    words = sentence.split()
    if len(words) <= _SENTENCE_WORDS:
        return [" ".join(words)]
    half = len(words) // 2
    commas = [i + 1 for i, word in enumerate(words) if word.endswith((",", ";", ")"))]
    at = min(commas, key=lambda i: abs(i - half), default=half)
    at = at if len(words) // 4 <= at <= len(words) * 3 // 4 else half
    return [*_cut(" ".join(words[:at])), *_cut(" ".join(words[at:]))]
