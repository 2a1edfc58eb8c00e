"""From a question and a column to a request, with the passages and adapters that the column's control takes.

The controls, each in place of the retrieved passages' own adapters:

- `wrong`: the adapters of passages that do not hold the answer; with the retrieved passages in the prompt, `wrong_rag`;
- `random`: random adapters of the same norm (`prag_core.evaluation.controls`);
- `task`: one adapter, trained on other passages, which can know the form of an answer but not the answer;
- `da`: no adapters; the prompt has the passages and their augmentations, which is the text that adapters learn;
- `reader`: the passages in the prompt and no adapter but the reader's. The column `rag` is the bare model.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from prag_core.data.questions import Question
from prag_core.errors import InputError
from prag_core.evaluation.controls import ZERO_ADAPTER, random_name, task_name
from prag_core.evaluation.metrics import contains
from prag_core.evaluation.plan import Column, EvaluationPlan, EvaluationRequest
from prag_core.identity import fingerprint
from prag_core.inference.route import choose
from prag_core.prompts import passage_text
from prag_core.records import Augmentation, Hit, Passage


@dataclass(frozen=True)
class QuestionContext:
    """What is known of one question before it is asked.

    The controls need the last four fields, and `auto` needs `trained`.
    """

    ranked: tuple[Hit, ...]  # the retrieved passages, best first
    gold: tuple[Passage, ...]  # the passages that hold the answer
    trained: frozenset[str] = frozenset()  # those keys of `ranked` and `gold` that have an adapter
    pool: Sequence[str] = ()  # keys of some passages of the corpus with an adapter, from which controls draw
    augmentations: Mapping[str, Augmentation] = field(default_factory=dict)  # by key, for the control `da`
    tasks: Sequence[str] = ()  # the name of the question's task adapter, for each seed


def make_request(
    question: Question, column: Column, seed: int, context: QuestionContext, plan: EvaluationPlan
) -> EvaluationRequest:
    """Return the request that asks a question as a column does; for `auto`, that of the mode which it chooses.

    Raises:
        InputError: when the control `wrong` has too few passages to choose from.
    """
    if column.mode == "auto":
        column = _chosen(column, context, plan)
    hits = _hits(question, column, seed, context, plan) if column.mode != "closed" else ()
    bare = column.mode == "closed" or (column.mode == "rag" and column.control != "reader")
    reader = "" if bare else plan.reader
    return EvaluationRequest(question.question, column.mode, column.weights, hits, column.strength, reader)


def _chosen(column: Column, context: QuestionContext, plan: EvaluationPlan) -> Column:
    """Return the column that answers in the mode which `auto` chooses for a question, as in service."""
    trained = bool(context.ranked) and context.ranked[0].passage.key in context.trained
    mode, _ = choose(plan.route, [hit.score for hit in context.ranked], trained)
    return replace(
        column,
        mode=mode,
        control="reader" if mode == "rag" and plan.reader else "",
        strength=column.strength if mode == "combine" else 1.0,
    )


def _hits(
    question: Question, column: Column, seed: int, context: QuestionContext, plan: EvaluationPlan
) -> tuple[Hit, ...]:
    """Return the passages of a request, each under the name of the adapter that the column's control takes."""
    own = context.ranked[: column.top_k]
    if plan.retrieval == "oracle":
        own = tuple(Hit(passage, 1.0) for passage in context.gold)
    match column.control:
        case "" | "reader":
            return own
        case "wrong":
            wrong = _wrong_hits(question, own, seed, context, plan)
            if column.mode == "prag":
                return wrong
            return tuple(_named(hit, other.passage.key) for hit, other in zip(own, wrong, strict=True))
        case "random":
            # A passage without an adapter would go into the prompt, so only trained passages get a random one.
            trained = [hit for hit in own if hit.passage.key in context.trained]
            return tuple(_named(hit, random_name(hit.passage.key, seed)) for hit in trained)
        case "task":
            # The task adapter counts once, however many passages there are. The first hit has weight one, so all others
            # get zeros; under `mean` the weights add up to one.
            task = task_name(context.tasks[seed])
            rest = task if column.weights == "mean" else ZERO_ADAPTER
            return tuple(_named(hit, rest if i else task) for i, hit in enumerate(own))
        case "da":
            return tuple(replace(hit, passage=_augmented(hit.passage, context.augmentations)) for hit in own)


def _named(hit: Hit, name: str) -> Hit:
    return replace(hit, passage=replace(hit.passage, key=name))


def _wrong_hits(
    question: Question, own: tuple[Hit, ...], seed: int, context: QuestionContext, plan: EvaluationPlan
) -> tuple[Hit, ...]:
    """Return as many wrong passages as `own` has, with its scores. A wrong one is not gold and holds no answer."""
    excluded = {hit.passage.key for hit in own} | {passage.key for passage in context.gold}
    answers = [answer for answer in question.answers if answer.lower() not in ("yes", "no")]
    usable = context.trained - excluded
    wrong: list[Passage] = []
    if plan.wrong == "nearest":
        wrong = [
            hit.passage
            for hit in context.ranked
            if hit.passage.key in usable and not any(contains(passage_text(hit.passage), answer) for answer in answers)
        ]
    # Random passages come last. Their keys are enough, because this control puts no passage into the prompt.
    pool = [key for key in context.pool if key not in excluded]
    random.Random(fingerprint([seed, question.id])).shuffle(pool)
    nearest = {passage.key for passage in wrong}
    wrong += [Passage(key, "", "", ()) for key in pool if key not in nearest]
    if len(wrong) < len(own):
        raise InputError(
            f"the control 'wrong' finds only {len(wrong)} other passages with an adapter",
            "leave the control out, or evaluate on a snapshot with more passages",
        )
    return tuple(replace(hit, passage=passage) for hit, passage in zip(own, wrong, strict=False))


def _augmented(passage: Passage, augmentations: Mapping[str, Augmentation]) -> Passage:
    """Return a passage whose text is followed by its augmentation."""
    found = augmentations.get(passage.key)
    if found is None:
        return passage
    pairs = [f"{pair.question} {pair.full_answer}" for pair in found.pairs]
    return replace(passage, text="\n".join([passage.text, *found.rewrites, *pairs]))
