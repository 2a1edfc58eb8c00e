"""Question-answer pairs from a small model, one sentence and one answer at a time.

A model of some hundred million parameters cannot think up a question, but it can finish one: the answer is chosen
by rules, its kind gives the question's first words, the model writes the rest, and of all it wrote the questions
are kept after which the model itself finds the answer likely.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from prag_core.augmentation.answer_rules import AnswerCandidate, find_answers
from prag_core.augmentation.filter import Draft, contains_text, fold_text, refusal
from prag_core.augmentation.prompts import asking_prompt, reading_prompt
from prag_core.errors import GenerationError
from prag_core.llm.generator import Generator, Prompt, Scorer
from prag_core.recipe import AugmentRecipe
from prag_core.records import Passage, QAPair

# Questions an attempt tries for a passage.
_QUESTIONS_PER_ATTEMPT = 7
_QUESTION_TOKENS = 24
# Mean log-probability of the answer, given sentence and question, below which a question is refused.
_THRESHOLD = -1.3
# What naming the topic is worth: such a question can be understood without its passage.
_TOPIC_BONUS = 0.7
# What a capitalized word costs that the passage does not hold: a name misspelt, or made up.
_STRANGER_COST = 1.0
_SENTENCE_WORDS = 45

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"”’)\]]*\s+(?=[\"“‘(\[]?[^\W_a-z])")
_NO_END = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Gen|Col|Lt|Capt|No|vs|ca|[A-Z])\.)\s*\Z")


@dataclass(frozen=True, slots=True)
class _Question:
    """A question in the making: for which draft, what it asks, and its first words."""

    draft: Draft
    ask: AnswerCandidate
    opening: str

    @property
    def topic(self) -> str:
        return topic_of(self.draft.passage)


def ask(drafts: Sequence[Draft], generator: Generator, recipe: AugmentRecipe, attempt: int) -> None:
    """Give each draft the best pairs that its next few questions make. A generator that scores is what it needs.

    One that is no `Scorer` (an endpoint) has its questions taken in the order of the rules.
    """
    # 1. The questions of this attempt; each attempt goes further down the list of what can be asked.
    questions = [
        question
        for draft in drafts
        for question in _questions(draft)[attempt * _QUESTIONS_PER_ATTEMPT : (attempt + 1) * _QUESTIONS_PER_ATTEMPT]
    ]
    # 2. The model finishes them, and the filter turns the useless away before they cost a score.
    pairs: list[tuple[_Question, QAPair]] = []
    for question, text in zip(questions, _finish(questions, generator), strict=True):
        if isinstance(text, GenerationError):
            question.draft.error = text
            continue
        pair = QAPair(text, question.ask.answer, question.ask.sentence)
        if reason := refusal(pair, question.draft.passage, question.draft.pairs):
            question.draft.refused[reason] += 1
        else:
            pairs.append((question, pair))
    # 3. The model reads sentence and question: how likely is the answer?
    scores = [0.0] * len(pairs)
    if isinstance(generator, Scorer):
        readings = [(reading_prompt(q.topic, q.ask.sentence, pair.question), f" {pair.answer}") for q, pair in pairs]
        scores = generator.score(readings)
    # 4. The best question of each answer, then the best answers, at first one a sentence.
    for draft in drafts:
        kept = []
        for (question, pair), score in zip(pairs, scores, strict=True):
            if question.draft is not draft:
                continue
            if score < _THRESHOLD:
                draft.refused["low_score"] += 1
            else:
                kept.append((score + _merit(pair.question, draft.passage), question.ask, pair))
        _choose(draft, kept, recipe.pairs)


def _choose(draft: Draft, kept: list[tuple[float, AnswerCandidate, QAPair]], wanted: int) -> None:
    best: dict[str, tuple[float, AnswerCandidate, QAPair]] = {}
    for item in sorted(kept, key=lambda item: -item[0]):
        best.setdefault(fold_text(item[2].answer), item)
    used = {pair.full_answer for pair in draft.pairs}
    first: list[tuple[float, AnswerCandidate, QAPair]] = []
    more: list[tuple[float, AnswerCandidate, QAPair]] = []
    for item in best.values():
        (more if item[1].sentence in used else first).append(item)
        used.add(item[1].sentence)
    for _, _, pair in [*first, *more]:
        if len(draft.pairs) < wanted:
            draft.offer(pair)


def _questions(draft: Draft) -> list[_Question]:
    """Return all questions about a passage: the first opening of every answer, then the second ones."""
    asks = find_answers(topic_of(draft.passage), sentences_of(draft.passage))
    most = max((len(ask.openings) for ask in asks), default=0)
    return [
        _Question(draft, ask, ask.openings[rank]) for rank in range(most) for ask in asks if rank < len(ask.openings)
    ]


def _finish(questions: Sequence[_Question], generator: Generator) -> list[str | GenerationError]:
    """Return each question in full; the model finishes the openings that are not whole questions already."""
    prompts = [
        Prompt(asking_prompt(q.topic, q.ask.sentence, q.ask.answer, q.opening), chat=False, stop="\n")
        for q in questions
        if not q.opening.endswith("?")
    ]
    replies = iter(generator.generate(prompts, max_new_tokens=_QUESTION_TOKENS) if prompts else [])
    texts: list[str | GenerationError] = []
    for question in questions:
        if question.opening.endswith("?"):
            texts.append(question.opening)
            continue
        reply = next(replies)
        if isinstance(reply, str):
            # What follows the first question mark is another question.
            reply = re.sub(r"\?.*", "?", f"{question.opening} {reply.strip()}", flags=re.DOTALL)
        texts.append(reply)
    return texts


def topic_of(passage: Passage) -> str:
    """Return what a passage is about: its title, or its first words."""
    return passage.title or " ".join(passage.text.split()[:4])


def _merit(question: str, passage: Passage) -> float:
    """Return what a question's words are worth beside its score: it should be clear without the passage."""
    topic = topic_of(passage)
    named = any(contains_text(question, word) for word in re.findall(r"\w{4,}", topic) or [topic])
    names = re.findall(r"\b[A-Z]\w+", question.partition(" ")[2])
    stranger = any(not contains_text(f"{topic} {passage.text}", name) for name in names)
    return _TOPIC_BONUS * named - _STRANGER_COST * stranger


def sentences_of(passage: Passage) -> list[str]:
    """Return the sentences of a passage; a long one is cut where it has a comma, or else where it must."""
    parts: list[str] = []
    start = 0
    for match in _SENTENCE_END.finditer(passage.text):
        if not _NO_END.search(passage.text[start : match.start()]):
            parts.append(passage.text[start : match.end()].strip())
            start = match.end()
    parts.append(passage.text[start:].strip())
    return [piece for part in parts for piece in _cut(part) if piece]


def _cut(sentence: str) -> list[str]:
    words = sentence.split()
    if len(words) <= _SENTENCE_WORDS:
        return [" ".join(words)]
    half = len(words) // 2
    commas = [i + 1 for i, word in enumerate(words) if word.endswith((",", ";", ")"))]
    at = min(commas, key=lambda i: abs(i - half), default=half)
    at = at if len(words) // 4 <= at <= len(words) * 3 // 4 else half
    return [*_cut(" ".join(words[:at])), *_cut(" ".join(words[at:]))]
