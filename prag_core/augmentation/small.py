"""The strategy `small`: question-answer pairs from a small model, one sentence and one answer at a time.

A model of about a hundred million parameters cannot invent a question, but it can complete one. Rules choose an
answer and the first words of its question, and the model writes the rest. A question is kept if the model then finds
the answer likely, given the sentence and the question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from prag_core.augmentation.answer_rules import AnswerCandidate, find_answers
from prag_core.augmentation.filter import Draft, contains_text, fold_text, refusal
from prag_core.augmentation.prompts import asking_prompt, reading_prompt
from prag_core.augmentation.sentences import sentences_of, topic_of
from prag_core.errors import GenerationError
from prag_core.llm.generator import Generator, Prompt, Scorer
from prag_core.llm.reply import reply_content
from prag_core.recipe import AugmentRecipe
from prag_core.records import Passage, QAPair

# How many questions an attempt tries for each passage.
_QUESTIONS_PER_ATTEMPT = 7
_QUESTION_TOKENS = 24
# A question is refused if the mean log-probability of its answer, given sentence and question, is below this.
_THRESHOLD = -1.3
# Added to the score of a question that names the topic, because it can be understood without its passage.
_TOPIC_BONUS = 0.7
# Subtracted for a capitalized word that is not in the passage: it is a misspelt or invented name.
_STRANGER_COST = 1.0


@dataclass(frozen=True, slots=True)
class _OpenQuestion:
    """A question before the model completes it: its draft, its answer and its first words."""

    draft: Draft
    candidate: AnswerCandidate
    opening: str

    @property
    def topic(self) -> str:
        return topic_of(self.draft.passage)


def add_completed_pairs(drafts: Sequence[Draft], generator: Generator, recipe: AugmentRecipe, attempt: int) -> None:
    """Add the best pairs of the next few questions of each draft.

    If the generator is no `Scorer` (an endpoint), questions are taken in the order of the rules.
    """
    # 1. Take the questions of this attempt: each attempt continues the list where the one before it ended.
    questions = [
        question
        for draft in drafts
        for question in _questions(draft)[attempt * _QUESTIONS_PER_ATTEMPT : (attempt + 1) * _QUESTIONS_PER_ATTEMPT]
    ]
    # 2. The model completes them, and the filter refuses unusable ones before they are scored.
    pairs: list[tuple[_OpenQuestion, QAPair]] = []
    for question, text in zip(questions, _complete(questions, generator), strict=True):
        if isinstance(text, GenerationError):
            question.draft.error = text
            continue
        pair = QAPair(text, question.candidate.answer, question.candidate.sentence)
        if reason := refusal(pair, question.draft.passage, question.draft.pairs):
            question.draft.refused[reason] += 1
        else:
            pairs.append((question, pair))
    # 3. The model reads sentence and question and scores the answer.
    scores = [0.0] * len(pairs)
    if isinstance(generator, Scorer):
        readings = [
            (reading_prompt(q.topic, q.candidate.sentence, pair.question), f" {pair.answer}") for q, pair in pairs
        ]
        scores = generator.score(readings)
    # 4. Keep the best question of each answer, then the best answers, first one for each sentence.
    for draft in drafts:
        kept = []
        for (question, pair), score in zip(pairs, scores, strict=True):
            if question.draft is not draft:
                continue
            if score < _THRESHOLD:
                draft.refused["low_score"] += 1
            else:
                kept.append((score + _merit(pair.question, draft.passage), question.candidate, pair))
        _choose(draft, kept, draft.wanted)


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


def _questions(draft: Draft) -> list[_OpenQuestion]:
    """Return all questions about a passage: those with each answer's first opening, then those with the second."""
    candidates = find_answers(topic_of(draft.passage), sentences_of(draft.passage))
    most = max((len(candidate.openings) for candidate in candidates), default=0)
    return [
        _OpenQuestion(draft, candidate, candidate.openings[rank])
        for rank in range(most)
        for candidate in candidates
        if rank < len(candidate.openings)
    ]


def _complete(questions: Sequence[_OpenQuestion], generator: Generator) -> list[str | GenerationError]:
    """Return each question in full, or the error of its prompt; the model completes those that are not whole yet."""
    prompts = [
        Prompt(asking_prompt(q.topic, q.candidate.sentence, q.candidate.answer, q.opening), chat=False, stop="\n")
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
            # Cut at the first question mark: another question may follow.
            said = reply_content(reply, question.candidate.sentence) or ""
            reply = re.sub(r"\?.*", "?", f"{question.opening} {said.strip()}", flags=re.DOTALL)
        texts.append(reply)
    return texts


def _merit(question: str, passage: Passage) -> float:
    """Return what a question's words add to its score: a bonus for the topic, a cost for names not in the passage."""
    topic = topic_of(passage)
    named = any(contains_text(question, word) for word in re.findall(r"\w{4,}", topic) or [topic])
    names = re.findall(r"\b[A-Z]\w+", question.partition(" ")[2])
    stranger = any(not contains_text(f"{topic} {passage.text}", name) for name in names)
    return _TOPIC_BONUS * named - _STRANGER_COST * stranger
