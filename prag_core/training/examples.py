"""Training examples: the token sequences on which a passage's adapter is trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prag_core.llm.chat import answer_prefix_ids, document_ids, end_of_turn_id, questions_ids, texts_ids
from prag_core.prompts import answer_target, passage_text
from prag_core.recipe import TrainRecipe
from prag_core.records import Augmentation, Passage, QAPair


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """The token ids of one step; the loss is the mean over the tokens from position `scored_from` (at least 1) on."""

    ids: tuple[int, ...]
    scored_from: int = 1


@dataclass(frozen=True)
class TrainingJob:
    """One adapter to train: the passage's key and its examples, one for each step of an epoch, in order."""

    key: str
    examples: tuple[TrainingExample, ...]

    @property
    def tokens(self) -> int:
        """The number of tokens in one epoch."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest example."""
        return max(len(example.ids) for example in self.examples)


def training_examples(
    tokenizer: Any, passage: Passage, augmentation: Augmentation, recipe: TrainRecipe
) -> tuple[TrainingExample, ...]:
    """Return the training examples of a passage, in the order in which they are trained.

    Each example asks a question, with or without a context in the prompt:
    - `recipe.examples` = `paper` (the paper's section 3.2 and the authors' code): the first half of the questions,
      rounded up, with the passage and then with each rewrite as context; the other questions without context.
    - `questions`: all questions without context, as they will be asked later.
    Where an augmentation has no rewrite, the passage takes its place. An example of more than `recipe.max_tokens`
    tokens is left out: cut off, it would teach half an answer or none.

    `recipe.without` leaves something out. `rewrites`: no rewrite, and no passage in its place. `qa`: no questions; the
    passage and the rewrites themselves are the examples, and are truncated. `both`: the passage is the only example.

    Raises:
        TurnsError: when the tokenizer cannot encode a text without control tokens.
    """
    if recipe.without in ("qa", "both"):
        return _text_examples(tokenizer, passage, augmentation, recipe)
    examples = _pair_examples(tokenizer, [*_pairs_with_contexts(passage, augmentation, recipe)], recipe)
    return tuple(example for example in examples if example is not None)


def pair_example(tokenizer: Any, pair: QAPair, passages: Sequence[str], recipe: TrainRecipe) -> TrainingExample | None:
    """Return the example that asks a question with these passages in its prompt.

    None when it has more than `recipe.max_tokens` tokens, so that its answer or its end would be cut off.
    """
    (example,) = _pair_examples(tokenizer, [(pair, passages)], recipe)
    return example


def _pair_examples(
    tokenizer: Any, asked: Sequence[tuple[QAPair, Sequence[str]]], recipe: TrainRecipe
) -> list[TrainingExample | None]:
    """Return `pair_example` of each pair with its passages."""
    questions = questions_ids(
        tokenizer, [(pair.question, passages) for pair, passages in asked], template=recipe.template
    )
    targets = texts_ids(tokenizer, [answer_target(pair, recipe.template) for pair, _ in asked])
    # The words with which each answer begins are in the prompt when the question is asked: there is nothing to learn.
    prefix, end = answer_prefix_ids(tokenizer, recipe.template), _end(tokenizer, recipe)
    examples: list[TrainingExample | None] = []
    for question, target in zip(questions, targets, strict=True):
        ids = (*question, *target, *end)
        given = len(prefix) if target[: len(prefix)] == prefix else 0
        scored_from = len(question) + given if recipe.loss == "answer" else 1
        examples.append(TrainingExample(ids, scored_from) if len(ids) <= recipe.max_tokens else None)
    return examples


def _text_examples(
    tokenizer: Any, passage: Passage, augmentation: Augmentation, recipe: TrainRecipe
) -> tuple[TrainingExample, ...]:
    texts = [passage_text(passage), *(() if recipe.without == "both" else augmentation.rewrites)]
    end = _end(tokenizer, recipe)
    sequences = [tuple([*document_ids(tokenizer, text), *end][: recipe.max_tokens]) for text in texts]
    return tuple(TrainingExample(ids) for ids in sequences if len(ids) > 1)


def _end(tokenizer: Any, recipe: TrainRecipe) -> list[int]:
    """Return the token that ends an example, if the recipe ends examples with one."""
    end = end_of_turn_id(tokenizer) if recipe.eos else None
    return [] if end is None else [end]


def _pairs_with_contexts(
    passage: Passage, augmentation: Augmentation, recipe: TrainRecipe
) -> Iterator[tuple[QAPair, list[str]]]:
    text = passage_text(passage)
    contexts = [text] if recipe.without == "rewrites" else [text, *(augmentation.rewrites or (text,))]
    pairs = augmentation.pairs
    half = 0 if recipe.examples == "questions" else (len(pairs) + 1) // 2
    with_passage, without = pairs[:half], pairs[half:]
    yield from ((pair, [context]) for pair, context in itertools.product(with_passage, contexts))
    yield from ((pair, []) for pair in without)
