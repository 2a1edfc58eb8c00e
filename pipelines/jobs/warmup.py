"""The warm-up on Ray Train: one adapter, trained by several workers on questions that nobody will be asked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.session import ray_session
from pipelines.execution.lookup import batches, find_gold
from pipelines.execution.tables import read_parts
from pipelines.settings import describe, profile_of
from prag_core.config import Config
from prag_core.data.gold import match_gold
from prag_core.data.questions import Question
from prag_core.errors import ConfigError, InputError, PragError
from prag_core.evaluation.plan import draw
from prag_core.identity import fingerprint
from prag_core.llm.base_model import load_base_model
from prag_core.llm.peft import export_peft
from prag_core.llm.threads import compute_here
from prag_core.recipe import TrainRecipe
from prag_core.store.adapters import get_start, put_start
from prag_core.store.objects import Store, open_store
from prag_core.store.snapshot import current_id, load_snapshot
from prag_core.training.trainer import Trainer
from prag_core.training.warmup import WarmupSettings, train_warmup, warmup_examples, with_texts, without_overlap


@dataclass(frozen=True)
class _Trained:
    start: str
    first_loss: float
    last_loss: float


@dataclass(frozen=True)
class Warmup:
    """A warm-up that was trained: the name of its factors in the store, its questions, and how the loss went.

    The losses are means over the first and the last tenth of the steps.
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

    The name is for `train.initial_adapter`, or, when it was trained with `settings.reading`, for `answer.reader`.
    Questions that share words or a gold passage with `others`, or words with a question of the store's augmentations,
    are left out; of the rest `limit` are drawn, the same each time. `export` names a folder for the same adapter in
    PEFT's form.

    Raises:
        InputError: when no question is left, or none brings the passages that `settings.reading` wants.
        ConfigError: when the configuration names a `train.initial_adapter` already.
    """
    if config.train.initial_adapter:
        raise ConfigError("train.initial_adapter is set, and a warm-up makes one", "leave it out")
    store = open_store(config)
    store.check_writable()
    recipe, layout = describe(config)
    profile = profile_of(config)
    with ray_session(profile):
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer

        asked = _augmentation_questions(store, recipe.augment.fingerprint, profile.partitions)
        usable = with_texts(questions) if settings.reading else list(questions)
        free = without_overlap(usable, others, asked)
        free = _about_other_passages(store, free, others, profile.partitions)
        chosen = draw(free, limit)
        console.print(
            f"warm-up: {len(chosen)} questions; left out: {len(usable) - len(free)} for overlap, "
            f"{len(questions) - len(usable)} without their passage, {len(free) - len(chosen)} over the limit"
        )
        loop = {
            "config": config,
            "store": store,
            "recipe": recipe.train,
            "base_model": recipe.base_model,
            "questions": chosen,
            "settings": settings,
            "threads": profile.model_actors.threads,
        }
        # Ray Train moves its workers into a folder of its own, where relative paths of the configuration lead nowhere.
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
        with tempfile.TemporaryDirectory(prefix="prag-warmup-") as scratch:
            trainer = TorchTrainer(
                _train,
                train_loop_config=loop,
                scaling_config=ScalingConfig(
                    num_workers=workers,
                    use_gpu=profile.model_actors.gpus > 0,
                    resources_per_worker={"CPU": profile.model_actors.cpus},
                ),
                run_config=RunConfig(storage_path=scratch, failure_config=FailureConfig(max_failures=2)),
            )
            try:
                trained = trainer.fit().return_value
            except TrainingFailedError as error:
                raise PragError(f"the warm-up failed: {error}", "mend what its worker says, and run it again") from None
    if not isinstance(trained, _Trained):
        raise PragError("the warm-up ended without a result", "run it again")
    made = Warmup(**asdict(trained), questions=len(chosen), left_out=len(questions) - len(chosen))
    about = {
        "warmup": asdict(made),
        "settings": asdict(settings),
        "recipe": asdict(recipe.train),
        "base_model": recipe.base_model,
        "questions": fingerprint([[q.question, q.answers[0]] for q in chosen]),
    }
    store.put_json(f"starts/{made.start}.json", about)
    if export is not None:
        export_peft(layout, get_start(store, made.start), export, config.model.name)
    return made


def _about_other_passages(
    store: Store, questions: Sequence[Question], others: Sequence[Question], partitions: int
) -> list[Question]:
    """Return the questions that share no passage of the published corpus with `others`.

    Two sets may name the same passage differently, one by its text and the other by an id: the corpus tells.
    """
    if current_id(store) is None:
        return list(questions)
    passages = find_gold(store, load_snapshot(store), [*questions, *others], partitions)
    # An id is unique within a set, and `others` may be of several.
    others = [replace(question, id=str(place)) for place, question in enumerate(others)]
    taken = {passage.key for of in match_gold(others, passages).values() for passage in of}
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
    return [pair["question"] for batch in batches(rows) for pairs in batch["pairs"].to_pylist() for pair in pairs]


def _train(loop: dict[str, Any]) -> _Trained | None:
    """What each worker runs; the first one stores the result."""
    import ray.train
    import torch.distributed

    recipe: TrainRecipe = loop["recipe"]
    compute_here(loop["threads"])
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    base = load_base_model(loop["config"].model, expected=loop["base_model"])
    trainer = Trainer(base, recipe)
    losses: list[float] = []
    factors = train_warmup(
        trainer,
        warmup_examples(trainer, loop["questions"], reading=loop["settings"].reading),
        loop["settings"],
        rank=rank,
        workers=workers,
        all_reduce=torch.distributed.all_reduce if workers > 1 else lambda tensor: None,
        on_step=lambda _, loss: losses.append(loss),
    )
    if rank:
        return None
    tenth = max(1, len(losses) // 10)
    return _Trained(
        start=put_start(loop["store"], trainer.layout, factors),
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
    )
