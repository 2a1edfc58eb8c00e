"""Training a shared adapter on questions that are never asked later: a warm-up, a reader or a writer.

A warm-up is trained on questions without passages and learns the form of answers. Each passage's adapter starts from
it, so that its few steps go into the passage's facts. A reader is trained on questions with their passages in the
prompt and learns to answer from them; it is added wherever a passage is in the prompt. A writer
learns to ask such questions (`prag_core.augmentation.writer`). Workers share each batch (data parallelism), and their
number does not change its gradient.
"""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prag_core.augmentation.writer import writer_tasks
from prag_core.data.questions import Gold, Question, normalize_answer
from prag_core.errors import AdapterError, InputError, TurnsError
from prag_core.llm.chat import document_ids, end_of_turn_id, text_ids
from prag_core.llm.lora import check_factors, initial_factors
from prag_core.prompts import passage_text
from prag_core.records import Passage, QAPair
from prag_core.training.examples import TrainingExample, pair_example
from prag_core.training.trainer import Trainer, has_learned, stack_factors, unstack_factors


@dataclass(frozen=True)
class WarmupSettings:
    """The settings that decide a warm-up, besides the recipe and the questions.

    `batch` counts the examples of all workers together. `reading` puts each question's gold passages into its prompt,
    and `asking` learns to write the questions. `rank` is the adapter's; 0 is that of the recipe.
    """

    learning_rate: float = 3e-4
    epochs: int = 1
    batch: int = 8
    seed: int = 0
    reading: bool = False
    asking: bool = False
    rank: int = 0


def without_overlap(
    questions: Sequence[Question], others: Sequence[Question], texts: Sequence[str] = ()
) -> list[Question]:
    """Return the questions that share neither words nor a gold passage with `others`, nor words with `texts`.

    Args:
        questions: The questions to choose from.
        others: The questions that will be asked later.
        texts: The words of further questions, such as those of a corpus's augmentations.

    Raises:
        InputError: when none is left.
    """
    words = {normalize_answer(q.question) for q in others} | {normalize_answer(text) for text in texts}
    gold = {g for q in others for g in q.gold}
    left = [q for q in questions if normalize_answer(q.question) not in words and not gold & set(q.gold)]
    if not left:
        raise InputError(
            f"none of the {len(questions)} questions is free of overlap", "warm up on questions of another set"
        )
    return left


def with_texts(questions: Sequence[Question]) -> list[Question]:
    """Return the questions that contain the texts of all their gold passages.

    Raises:
        InputError: when there are none.
    """
    left = [q for q in questions if q.gold and all(gold.text for gold in q.gold)]
    if not left:
        raise InputError(
            f"none of the {len(questions)} questions has the text of its passage",
            "use a set that has them, such as SQuAD, HotpotQA or 2WikiMultihopQA",
        )
    return left


def warmup_examples(trainer: Trainer, questions: Sequence[Question], *, reading: bool = False) -> list[TrainingExample]:
    """Return a training example for each question and its first answer, in the form of the trainer's recipe.

    With `reading` the question's gold passages are in the prompt, and the loss is on the answer alone, whatever the
    recipe says: the adapter should learn to answer from passages, not what these passages say. A question whose example
    has more than `recipe.max_tokens` tokens, or a text without an encoding, is left out.

    Raises:
        InputError: when no example is left.
    """
    recipe, tokenizer = trainer.recipe, trainer.base.tokenizer
    if reading:
        recipe = replace(recipe, loss="answer")
    examples = []
    for question in questions:
        pair = QAPair(question.question, question.answers[0], question.answers[0])
        gold = question.gold if reading else ()
        texts = [passage_text(Passage("", passage.title, passage.text, ())) for passage in gold]
        with contextlib.suppress(TurnsError):  # a text that cannot be encoded
            examples.append(pair_example(tokenizer, pair, texts, recipe))
    fitting = [example for example in examples if example is not None]
    if not fitting:
        raise InputError(
            f"none of the {len(questions)} questions fits into {recipe.max_tokens} tokens with its answer",
            "raise train.max_tokens",
        )
    return fitting


def asking_examples(trainer: Trainer, questions: Sequence[Question]) -> list[TrainingExample]:
    """Return the training examples of a writer: its tasks about the questions' gold passages.

    The loss is on the reply alone. An example that has more than `recipe.max_tokens` tokens, or a text without an
    encoding, is left out.

    Raises:
        InputError: when no example is left.
    """
    tokenizer, most = trainer.base.tokenizer, trainer.recipe.max_tokens
    end = end_of_turn_id(tokenizer)
    pairs: dict[Gold, list[tuple[str, str]]] = defaultdict(list)
    for question in questions:
        for gold in question.gold:
            pairs[gold].append((question.question, question.answers[0].removesuffix(".")))
    examples = []
    for gold, asked in pairs.items():
        for prompt, reply in writer_tasks(Passage("", gold.title, gold.text, ()), asked):
            with contextlib.suppress(TurnsError):  # a text that cannot be encoded
                given = document_ids(tokenizer, prompt)
                target = [*text_ids(tokenizer, f" {reply}"), *([] if end is None else [end])]
                if len(given) + len(target) <= most:
                    examples.append(TrainingExample((*given, *target), len(given)))
    if not examples:
        raise InputError(
            f"none of the {len(questions)} questions has an answer that a sentence of its passage holds",
            "use a set whose answers are words of the passages, such as SQuAD",
        )
    return examples


def train_warmup(
    trainer: Trainer,
    examples: Sequence[TrainingExample],
    settings: WarmupSettings,
    *,
    rank: int = 0,
    workers: int = 1,
    all_reduce: Callable[[Tensor], Any] = lambda tensor: None,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Tensor]:
    """Train one adapter and return its fp32 factors on the CPU; all workers return the same.

    Args:
        trainer: Holds the frozen model and the recipe.
        examples: The same ones for all workers, in the same order.
        settings: Learning rate, epochs, batch size and seed.
        rank: The number of this worker, from 0; it takes its share of each batch.
        workers: The number of workers.
        all_reduce: Replaces a tensor by its sum over the workers, in place; for one worker it does nothing.
        on_step: Called after each step with its number, from 1, and the batch's mean loss.

    Raises:
        AdapterError: when training has changed nothing, or a factor is not finite.
    """
    device, layout = trainer.base.device, trainer.layout
    start = initial_factors(layout, settings.seed)
    stacked = stack_factors(layout, start, 1, dtype=torch.float32, device=device)
    leaves = [leaf for pair in stacked.values() for leaf in pair]
    optimizer = torch.optim.AdamW(leaves, lr=settings.learning_rate, weight_decay=trainer.recipe.weight_decay)
    shuffler = random.Random(settings.seed)
    step = 0
    for _ in range(settings.epochs):
        order = shuffler.sample(range(len(examples)), len(examples))
        for begin in range(0, len(order), settings.batch):
            chosen = order[begin : begin + settings.batch]
            mine = [examples[i] for i in chosen[rank::workers]]
            optimizer.zero_grad(set_to_none=False)
            total = torch.zeros((), device=device)
            if mine:
                loss, _ = trainer.loss([mine], stacked)
                # A worker's share is the sum over its examples; the batch's mean is taken over all workers' below.
                loss = loss * len(mine)
                loss.backward()  # type: ignore[no-untyped-call]
                total = loss.detach()
            for leaf in leaves:
                if leaf.grad is None:
                    leaf.grad = torch.zeros_like(leaf)
                all_reduce(leaf.grad)
                leaf.grad /= len(chosen)
            all_reduce(total)
            optimizer.step()
            step += 1
            if on_step is not None:
                on_step(step, float(total) / len(chosen))
    factors = {name: factor[0].cpu() for name, factor in unstack_factors(stacked, slice(1)).items()}
    check_factors(layout, factors, "of the warm-up")
    if not has_learned(factors, start):
        raise AdapterError("the warm-up has changed nothing", "raise its learning rate or its epochs")
    return factors
