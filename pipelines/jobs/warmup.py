"""Warm-up on Ray Train: several workers train one adapter on questions that are not asked later."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from cluster.session import ray_session
from pipelines.execution.lookup import find_gold
from pipelines.execution.tables import iter_blocks, read_parts
from pipelines.settings import RunContext, make_context
from pipelines.words import counted
from prag_core.augmentation.formats import read_augmentations
from prag_core.config import Config
from prag_core.data.files import read_text
from prag_core.data.gold import match_gold
from prag_core.data.parsing import json_lines
from prag_core.data.questions import Gold, Question
from prag_core.errors import ConfigError, InputError, PragError
from prag_core.evaluation.plan import draw
from prag_core.identity import fingerprint
from prag_core.llm.base_model import load_base_model
from prag_core.llm.peft import export_peft, peft_base
from prag_core.llm.threads import compute_here
from prag_core.recipe import TrainRecipe
from prag_core.store.adapters import get_start, put_start
from prag_core.store.objects import Store
from prag_core.store.snapshot import current_id, load_snapshot
from prag_core.training.trainer import Trainer
from prag_core.training.warmup import (
    WarmupSettings,
    asking_examples,
    train_warmup,
    warmup_examples,
    with_texts,
    without_overlap,
)


@dataclass(frozen=True)
class _Trained:
    start: str
    questions: int
    first_loss: float
    last_loss: float


@dataclass(frozen=True)
class Warmup:
    """A finished warm-up: the name of its factors in the store, its questions, and its losses.

    `first_loss` and `last_loss` are means over the first and the last tenth of the steps.
    """

    start: str
    questions: int
    left_out: int
    first_loss: float
    last_loss: float


def run_warmup(
    config: Config,
    questions: Sequence[Question],
    others: Sequence[Question],
    settings: WarmupSettings,
    console: Console,
    *,
    workers: int = 1,
    limit: int | None = None,
    export: Path | None = None,
) -> Warmup:
    """Train an adapter of the configured recipe's shape, store it, and return its name.

    The name is for `train.initial_adapter`, or for `answer.reader` if it was trained with `settings.reading`, or for
    `augment.writer` with `settings.asking`.
    A question is left out if it shares words or a gold passage with `others`, or words with a question of the store's
    augmentations. Of the rest `limit` are drawn, the same each time. `export` names a folder to which the adapter is
    also written in PEFT's format.

    Raises:
        InputError: when no question is left, or none brings the passages that `settings.reading` needs.
        ConfigError: when the configuration already names a `train.initial_adapter`.
    """
    if config.train.initial_adapter:
        raise ConfigError("train.initial_adapter is set, and a warm-up makes one", "leave it out")
    context = make_context(config)
    store, recipe, profile = context.store, context.recipe, context.profile
    store.check_writable()
    with ray_session(profile):
        asked = _augmentation_questions(store, recipe.augment.fingerprint, profile.partitions)
        usable = with_texts(questions) if settings.reading or settings.asking else list(questions)
        free = without_overlap(usable, others, asked)
        free = _about_other_passages(store, free, others, profile.partitions)
        chosen = draw(free, limit)
        console.print(
            f"warm-up: {counted(len(chosen), 'question')}; left out: {len(usable) - len(free)} for overlap, "
            f"{len(questions) - len(usable)} without their passage, {len(free) - len(chosen)} over the limit"
        )
        trained = _fit(context, chosen, settings, workers)
    if not settings.asking and (too_long := len(chosen) - trained.questions):
        console.print(f"warm-up: {counted(too_long, 'question')} left out: too long for train.max_tokens")
    warmup = Warmup(**asdict(trained), left_out=len(questions) - trained.questions)
    about = {
        "warmup": asdict(warmup),
        "settings": asdict(settings),
        "recipe": asdict(_recipe(context, settings)),
        "base_model": recipe.base_model,
        "questions": fingerprint([[q.question, q.answers[0]] for q in chosen]),
    }
    store.put_json(f"starts/{warmup.start}.json", about)
    if export is not None:
        train = _recipe(context, settings)
        layout = replace(context.layout, rank=train.rank, scale=train.scale)
        export_peft(layout, get_start(store, warmup.start), export, peft_base(config.model.name))
    return warmup


def _recipe(context: RunContext, settings: WarmupSettings) -> TrainRecipe:
    train = context.recipe.train
    # `train_warmup` keeps one rate, whatever the recipe of the passages' adapters does.
    return replace(train, rank=settings.rank or train.rank, schedule="constant")


def pairs_of_the_example() -> list[Question]:
    """Return the question-answer pairs of the example corpus with their passages: what a writer can learn from."""
    folder = "package://pipelines/examples/atlas"
    augmentations = read_augmentations(f"{folder}/augmentations.jsonl").by_name
    rows = [row for _, row in json_lines(read_text(f"{folder}/passages.jsonl", "install the package again"))]
    passages = [row for row in rows if isinstance(row, dict)]
    return [
        Question(f"{row['id']}-{n}", pair.question, (pair.answer,), gold=(Gold(title=row["title"], text=row["text"]),))
        for row in passages
        for n, pair in enumerate(augmentations[row["id"]].pairs)
    ]


def _fit(context: RunContext, questions: list[Question], settings: WarmupSettings, workers: int) -> _Trained:
    """Train on `workers` workers, each with the CPUs of a training actor, and one GPU if those have any."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    # Ray Train would start its workers in a folder of its own, where relative paths of the configuration do not exist.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    actors, train_loop = context.profile.train, cast(Any, partial(_train, context, questions, settings))
    with tempfile.TemporaryDirectory(prefix="prag-warmup-") as scratch:
        # The types of Ray know only its older trainer, whose function returns nothing.
        trainer: Any = TorchTrainer(
            train_loop,
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=actors.gpus > 0, resources_per_worker={"CPU": actors.cpus}
            ),
            run_config=RunConfig(storage_path=scratch, failure_config=FailureConfig(max_failures=2)),
        )
        try:
            trained = trainer.fit().return_value
        except TrainingFailedError as error:
            raise PragError(f"the warm-up failed: {error}", "fix what its worker reports, and run it again") from None
    if not isinstance(trained, _Trained):
        raise PragError("the warm-up ended without a result", "run it again")
    return trained


def _train(context: RunContext, questions: list[Question], settings: WarmupSettings) -> _Trained | None:
    """Run in each worker; the worker of rank 0 stores the result and returns it."""
    import ray.train
    import torch.distributed

    compute_here(context.profile.train.threads)
    worker = ray.train.get_context()
    rank, workers = worker.get_world_rank(), worker.get_world_size()
    # Ray Train gives a worker a whole GPU, or none.
    gpus = float(context.profile.train.gpus > 0)
    base = load_base_model(context.config.model, expected=context.recipe.base_model, gpus=gpus)
    trainer = Trainer(base, _recipe(context, settings))
    if settings.asking:
        examples = asking_examples(trainer, questions)
    else:
        examples = warmup_examples(trainer, questions, reading=settings.reading)
    losses: list[float] = []
    factors = train_warmup(
        trainer,
        examples,
        settings,
        rank=rank,
        workers=workers,
        all_reduce=torch.distributed.all_reduce if workers > 1 else lambda tensor: None,
        on_step=lambda _, loss: losses.append(loss),
    )
    if rank:
        return None
    tenth = max(1, len(losses) // 10)
    return _Trained(
        start=put_start(context.store, trainer.layout, factors),
        questions=len(questions) if settings.asking else len(examples),
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
    )


def _about_other_passages(
    store: Store, questions: Sequence[Question], others: Sequence[Question], partitions: int
) -> list[Question]:
    """Return the questions that share no passage of the published corpus with `others`.

    Two sets may name the same passage differently, one by its text and the other by an id, so the corpus is asked.
    """
    if current_id(store) is None:
        return list(questions)
    passages = find_gold(store, load_snapshot(store), [*questions, *others], partitions)
    # An id is unique within a set of questions only, and `others` may be from several sets.
    others = [replace(question, id=str(i)) for i, question in enumerate(others)]
    taken = {passage.key for matched in match_gold(others, passages).values() for passage in matched}
    gold = match_gold(questions, passages)
    left = [q for q in questions if not any(passage.key in taken for passage in gold[q.id])]
    if not left:
        raise InputError(
            f"each of the {len(questions)} questions is about a passage that will be asked about",
            "warm up on questions of another set",
        )
    return left


def _augmentation_questions(store: Store, augment_fingerprint: str, partitions: int) -> list[str]:
    rows = read_parts(store, f"augmentations/{augment_fingerprint}", ["pairs"], partitions)
    if rows is None:
        return []
    return [pair["question"] for block in iter_blocks(rows) for pairs in block["pairs"].to_pylist() for pair in pairs]
