"""A warm-up: one adapter trained on questions that nobody will be asked.

Asked without a passage, it learns how an answer looks, and every passage's adapter starts from it, so that its few
steps are left for what the passage says. Asked with its passage in the prompt (`reading`), it learns to answer from
what it reads: a reader, which is added to the passages' adapters where they are in the prompt too. It is trained by
data parallelism: the gradient of a step is that of the whole batch, however many workers share it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prag_core.data.questions import Question, normalize_answer
from prag_core.errors import InputError
from prag_core.llm.chat import question_ids
from prag_core.llm.lora import Factors, initial_factors
from prag_core.prompts import answer_target, passage_text
from prag_core.records import Passage, QAPair
from prag_core.training.examples import TrainingExample
from prag_core.training.trainer import Trainer


@dataclass(frozen=True)
class WarmupSettings:
    """What decides a warm-up, besides the recipe and the questions.

    `batch` is of all workers together. `reading` puts each question's gold passages into its prompt.
    """

    learning_rate: float = 3e-4
    epochs: int = 1
    batch: int = 8
    seed: int = 0
    reading: bool = False


def without_overlap(
    questions: Sequence[Question], others: Sequence[Question], texts: Sequence[str] = ()
) -> list[Question]:
    """Return the questions that share neither words nor a gold passage with `others`, nor words with `texts`.

    Args:
        questions: What could be trained on.
        others: What will be asked later.
        texts: Further questions, such as those that a corpus' augmentations ask.

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
    """Return the questions that bring the texts of all their gold passages.

    Raises:
        InputError: when none does.
    """
    left = [q for q in questions if q.gold and all(gold.text for gold in q.gold)]
    if not left:
        raise InputError(
            f"none of the {len(questions)} questions brings the text of its passage",
            "read with a set that has them, such as SQuAD, HotpotQA or 2WikiMultihopQA",
        )
    return left


def warmup_examples(trainer: Trainer, questions: Sequence[Question], *, reading: bool = False) -> list[TrainingExample]:
    """Return each question with its first answer, asked as the trainer's recipe asks.

    With `reading` its gold passages are in the prompt, and the loss is on the answer alone, whatever the recipe says:
    what is to be learned is how to answer from them, not what they say.
    """
    recipe, tokenizer = trainer.recipe, trainer.base.tokenizer
    examples = []
    for question in questions:
        pair = QAPair(question.question, question.answers[0], question.answers[0])
        texts = [passage_text(Passage("", of.title, of.text, ())) for of in question.gold] if reading else []
        asked = question_ids(tokenizer, pair.question, texts, template=recipe.template)
        answer = tokenizer.encode(answer_target(pair, recipe.template), add_special_tokens=False)
        ids = (*asked, *answer, *([tokenizer.eos_token_id] if recipe.eos else []))[: recipe.max_tokens]
        scored_from = len(asked) if reading or recipe.loss == "answer" else 1
        if scored_from < len(ids):
            examples.append(TrainingExample(ids, scored_from))
    return examples


def train_warmup(
    trainer: Trainer,
    examples: Sequence[TrainingExample],
    settings: WarmupSettings,
    *,
    rank: int = 0,
    workers: int = 1,
    add_up: Callable[[Tensor], Any] = lambda tensor: None,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Tensor]:
    """Train one adapter and return its fp32 factors on the CPU; each worker returns the same.

    Args:
        trainer: Holds the frozen model and the recipe.
        examples: All workers are given the same ones, in the same order.
        settings: How.
        rank: Which of the `workers` this is; it takes its share of each batch.
        workers: How many there are.
        add_up: Replaces a tensor by its sum over the workers; for one worker it does nothing.
        on_step: Called after each step with its number, from one, and the batch's mean loss.
    """
    device, layout = trainer.base.device, trainer.layout
    start: Factors = initial_factors(layout, settings.seed)
    leaves = {
        (layer, target): tuple(
            start[f"{target}.{name}"][position].to(device)[None].clone().requires_grad_() for name in "AB"
        )
        for target in layout.targets
        for position, layer in enumerate(layout.layers)
    }
    parameters = [leaf for pair in leaves.values() for leaf in pair]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=trainer.recipe.weight_decay)
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
                # All rows share the one adapter: its gradient is their sum.
                rows = {
                    place: (a.expand(len(mine), -1, -1), b.expand(len(mine), -1, -1))
                    for place, (a, b) in leaves.items()
                }
                loss, _ = trainer.loss(mine, rows)
                loss.backward()  # type: ignore[no-untyped-call]
                total = loss.detach()
            for leaf in parameters:
                if leaf.grad is None:
                    leaf.grad = torch.zeros_like(leaf)
                add_up(leaf.grad)
                leaf.grad /= len(chosen)
            add_up(total)
            optimizer.step()
            step += 1
            if on_step is not None:
                on_step(step, float(total) / len(chosen))
    return {
        f"{target}.{name}": torch.stack([leaves[layer, target][i][0].detach().float().cpu() for layer in layout.layers])
        for target in layout.targets
        for i, name in enumerate("AB")
    }
