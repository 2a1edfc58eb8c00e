"""Cloze questions: sentences of a passage that ask for one of their facts, as "The tower was built in what year?".

An adapter holds hardly anything that no pair asks about, and models leave many facts out. These questions are made by
rules, at no model's cost, for the facts that no other pair asks about (decision 90 in docs/decisions): those that rules
find, and those that a writer has named without a good question.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from prag_core.augmentation.answer_rules import AnswerCandidate, find_answers
from prag_core.augmentation.filter import Draft, contains_text, find_text
from prag_core.augmentation.sentences import sentences_of, topic_of
from prag_core.records import QAPair

# How many of a sentence's words before and behind its fact a question keeps: its tokens are trained in each epoch.
_WORDS_BEFORE = 12
_WORDS_BEHIND = 8
_BRACKETS = re.compile(r"\([^()]*\)")
# "Ada Lovelace was an English mathematician and …": what the passage's subject is.
_IS_A = re.compile(
    r"\b(is|was|are|were) (?:(?:an?|the|one of the) )([^,.;:]{3,60}?)"
    r"(?=[,.;:]| (?:that|which|who|whose|where|in|from|of|at|on|for|and|with|by|near|to|known|born)\b|\Z)"
)


def add_cloze_pairs(draft: Draft) -> None:
    """Add cloze pairs about the facts that no pair of the draft asks about, up to the number that it should have.

    The facts are what the passage's subject is, the names, dates and numbers that English rules find, and those that a
    writer has named.
    """
    for pair in _pairs(draft):
        if len(draft.pairs) >= draft.wanted:
            return
        if not any(_overlap(pair.answer, other.answer) for other in draft.pairs):
            draft.offer(pair)


def _pairs(draft: Draft) -> Iterator[QAPair]:
    topic, sentences = topic_of(draft.passage), sentences_of(draft.passage)
    subject = _BRACKETS.sub("", draft.passage.title).strip()
    if sentences and subject and (found := _IS_A.search(_BRACKETS.sub("", sentences[0]))):
        before = found.string[: found.start()]
        if len(before.split()) <= _WORDS_BEFORE and any(contains_text(before, word) for word in subject.split()):
            yield QAPair(f"What {found[1]} {subject}?", found[2].strip(), sentences[0])
    for candidate in [*find_answers(topic, sentences), *_named(draft)]:
        question = _question(candidate)
        if subject and not contains_text(question, subject):
            question = f"{subject}: {question}"
        yield QAPair(question, candidate.answer, candidate.sentence)


def _named(draft: Draft) -> Iterator[AnswerCandidate]:
    """Yield the facts that a writer has named without a good question, as their sentences write them."""
    for answer, sentence in draft.unasked:
        if place := find_text(sentence, answer):
            start, end = place
            yield AnswerCandidate(sentence[start:end], "what", sentence, start)


def _question(candidate: AnswerCandidate) -> str:
    sentence, start = candidate.sentence, candidate.start
    before, behind = sentence[:start], sentence[start + len(candidate.answer) :]
    kept = [*before.split()[-_WORDS_BEFORE:], candidate.place, *behind.split()[:_WORDS_BEHIND]]
    text = " ".join(kept).rstrip(" .,;:?!")
    return f"{text[0].upper()}{text[1:]}?"


def _overlap(one: str, other: str) -> bool:
    return contains_text(one, other) or contains_text(other, one)
