"""The strategy `writer`: pairs from a model of some hundred million parameters that has learned to write them.

`prag warmup --asking` trains one adapter for three short tasks, each about one sentence: to name the facts that one can
ask for, to ask for one of them, and to answer a question. A question is kept if the writer then answers it alike. Facts
without such a question are left to cloze questions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prag_core.augmentation.answer_rules import find_answers
from prag_core.augmentation.filter import Draft, contains_text, fold_text, is_same_fact
from prag_core.augmentation.prompts import ask_prompt, name_facts_prompt, read_prompt
from prag_core.augmentation.replies import TEMPERATURE, TOP_K, attempt_seed
from prag_core.augmentation.sentences import sentences_of, topic_of
from prag_core.errors import GenerationError
from prag_core.llm.generator import Generator, Prompt, ask_all
from prag_core.recipe import AugmentRecipe
from prag_core.records import Passage, QAPair

_FACTS_TOKENS = 48
_QUESTION_TOKENS = 32
_ANSWER_TOKENS = 24
_BETWEEN_FACTS = " | "
_WORD = re.compile(r"\w{3,}")
_NUMBER = re.compile(r"\w*\d\w*")
# A question is kept if its answer and the fact share at least this part of their words.
_SAME_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class _Fact:
    """A fact that a pair can ask for: an answer, and the sentence that holds it."""

    sentence: str
    answer: str


async def add_written_pairs(draft: Draft, generator: Generator, recipe: AugmentRecipe, attempt: int) -> None:
    """Ask for each fact of a draft, in other words in each later attempt, and add the pairs that are answered alike.

    The facts are those that the model names, and then those that English rules find. The first attempt leaves out what
    imported pairs ask about.
    """
    topic, sentences = topic_of(draft.passage), sentences_of(draft.passage)
    # 1. Name the facts of each sentence.
    prompts = [name_facts_prompt(topic, sentence) for sentence in sentences]
    named = await _replies(generator, draft, prompts, _FACTS_TOKENS)
    asked_about = [] if attempt else [pair.answer for pair in draft.pairs]
    facts = [
        fact
        for fact in _facts(topic, sentences, named)
        if not any(is_same_fact(fact.answer, answer) for answer in asked_about)
    ]
    # 2. Ask for each.
    prompts = [ask_prompt(topic, fact.sentence, fact.answer) for fact in facts]
    seed = attempt_seed(recipe, attempt, 0) if attempt else None
    asked = await _replies(generator, draft, prompts, _QUESTION_TOKENS, seed)
    questions = [(fact, text) for fact, text in zip(facts, asked, strict=True) if text]
    draft.unasked += [(fact.answer, fact.sentence) for fact, text in zip(facts, asked, strict=True) if not text]
    # 3. Answer each question, and keep those that are answered alike.
    prompts = [read_prompt(topic, fact.sentence, text) for fact, text in questions]
    answers = await _replies(generator, draft, prompts, _ANSWER_TOKENS)
    for (fact, question), answer in zip(questions, answers, strict=True):
        kept = False
        # Where there is no room for a question, there may still be for a cloze question.
        if len(draft.pairs) < draft.wanted:
            if kept := _same(answer, fact.answer):
                kept = draft.offer(QAPair(question, fact.answer, fact.sentence))
            else:
                draft.refused["answered_otherwise"] += 1
        if not kept:
            draft.unasked.append((fact.answer, fact.sentence))


def writer_tasks(passage: Passage, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield the (prompt, reply) from which a model learns to write the (question, answer) pairs of a passage.

    A pair is learned from the sentence that holds its answer and has the most words of its question. One whose answer
    no sentence holds is left out.
    """
    topic, sentences = topic_of(passage), sentences_of(passage)
    facts: dict[str, list[str]] = defaultdict(list)
    for question, answer in pairs:
        words = set(_WORD.findall(fold_text(question)))
        holding = [sentence for sentence in sentences if contains_text(sentence, answer)]
        if not holding:
            continue
        sentence = max(holding, key=lambda text: len(words & set(_WORD.findall(fold_text(text)))))
        facts[sentence].append(answer)
        yield ask_prompt(topic, sentence, answer), question
        yield read_prompt(topic, sentence, question), answer
    for sentence, answers in facts.items():
        folded = fold_text(sentence)
        ordered = sorted(dict.fromkeys(answers), key=lambda answer: folded.find(fold_text(answer)))
        yield name_facts_prompt(topic, sentence), _BETWEEN_FACTS.join(ordered)


def _facts(topic: str, sentences: Sequence[str], named: Sequence[str]) -> Iterator[_Fact]:
    """Yield each fact once: the named ones that their sentence holds, then those that the rules find."""
    seen: set[str] = set()
    found = [
        _Fact(sentence, answer.strip())
        for sentence, reply in zip(sentences, named, strict=True)
        for answer in reply.split(_BETWEEN_FACTS.strip())
    ]
    found += [_Fact(candidate.sentence, candidate.answer) for candidate in find_answers(topic, list(sentences))]
    for fact in found:
        folded = fold_text(fact.answer)
        if fact.answer and folded not in seen and contains_text(fact.sentence, fact.answer):
            seen.add(folded)
            yield fact


async def _replies(
    generator: Generator, draft: Draft, prompts: Sequence[str], limit: int, seed: int | None = None
) -> list[str]:
    """Return the first line of the reply to each prompt about a draft, sampled if there is a seed.

    If a prompt fails, its reply is empty and the draft notes the error.
    """
    sampled = seed is not None
    replies = await ask_all(
        generator,
        [Prompt(text, chat=False, stop="\n") for text in prompts],
        max_new_tokens=limit,
        temperature=TEMPERATURE if sampled else 0.0,
        top_k=TOP_K if sampled else 0,
        seed=seed or 0,
    )
    lines = []
    for reply in replies:
        if isinstance(reply, GenerationError):
            draft.error = reply
        lines.append("" if isinstance(reply, GenerationError) else reply.strip())
    return lines


def _same(answer: str, fact: str) -> bool:
    """Return whether an answer is the fact: no other number, and half of their long words."""
    answer, fact = fold_text(answer), fold_text(fact)
    numbers, others = set(_NUMBER.findall(answer)), set(_NUMBER.findall(fact))
    if not (numbers <= others or others <= numbers):
        return False
    one, other = {*_WORD.findall(answer), *numbers} or {answer}, {*_WORD.findall(fact), *others} or {fact}
    return len(one & other) >= _SAME_SHARE * len(one | other)
