"""From an augmentation to the token sequences that one adapter is trained on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prag_core.llm.chat import question_ids
from prag_core.prompts import answer_target, passage_text
from prag_core.recipe import TrainRecipe
from prag_core.records import Augmentation, Passage, QAPair


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """One step's token ids; the loss is the mean over the tokens from position `scored_from` (at least 1) on."""

    ids: tuple[int, ...]
    scored_from: int = 1


@dataclass(frozen=True)
class TrainingJob:
    """One adapter to train: the passage's key and its examples, in order, one step each."""

    key: str
    examples: tuple[TrainingExample, ...]

    @property
    def tokens(self) -> int:
        """The number of tokens of one epoch."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest example."""
        return max(len(example.ids) for example in self.examples)


def training_examples(
    tokenizer: Any, passage: Passage, augmentation: Augmentation, recipe: TrainRecipe
) -> tuple[TrainingExample, ...]:
    """Return the training examples of a passage, in the order in which they are trained, one step each.

    `paper` gives the paper's examples (section 3.2 and the authors' code): the first half of the questions,
    rounded up, with the passage and then with each rewrite; the others without. Where an augmentation has no
    rewrite, the passage stands in for it. `closed_book` asks only the first question with the passage and with
    each rewrite, and then each question without, the way in which it will be asked: fewer tokens, and more of
    them about the answer. Each example is truncated to `recipe.max_tokens` tokens; one of which nothing is left
    to learn then (`loss: answer`, and the question alone is too long) is left out.

    With `recipe.without` the rewrites are left out, and nothing stands in for them; or the questions are, and the
    texts themselves are trained, one after the other; or both, and the passage alone is.
    """
    if recipe.without in ("qa", "both"):
        return _text_examples(tokenizer, passage, augmentation, recipe)
    examples = []
    for pair, context in _plan(passage, augmentation, recipe):
        question = question_ids(tokenizer, pair.question, [context] if context else [], template=recipe.template)
        answer = tokenizer.encode(answer_target(pair, recipe.template), add_special_tokens=False)
        if recipe.eos:
            answer.append(tokenizer.eos_token_id)
        ids = (*question, *answer)[: recipe.max_tokens]
        scored_from = len(question) if recipe.loss == "answer" else 1
        if scored_from < len(ids):
            examples.append(TrainingExample(ids, scored_from))
    return tuple(examples)


def _text_examples(
    tokenizer: Any, passage: Passage, augmentation: Augmentation, recipe: TrainRecipe
) -> tuple[TrainingExample, ...]:
    texts = [passage_text(passage), *(() if recipe.without == "both" else augmentation.rewrites)]
    end = [tokenizer.eos_token_id] if recipe.eos else []
    ids = [tuple([*tokenizer.encode(text), *end][: recipe.max_tokens]) for text in texts]
    return tuple(TrainingExample(of) for of in ids if len(of) > 1)


def _plan(passage: Passage, augmentation: Augmentation, recipe: TrainRecipe) -> Iterator[tuple[QAPair, str | None]]:
    text = passage_text(passage)
    contexts = [text] if recipe.without == "rewrites" else [text, *(augmentation.rewrites or (text,))]
    pairs = augmentation.pairs
    if recipe.examples == "closed_book":
        with_passage, without = pairs[:1], pairs
    else:
        half = (len(pairs) + 1) // 2
        with_passage, without = pairs[:half], pairs[half:]
    yield from itertools.product(with_passage, contexts)
    yield from ((pair, None) for pair in without)
