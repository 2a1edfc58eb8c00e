"""A sample of passages, really augmented and trained where the job will run, to know what the job costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from rich.console import Console

from cluster.resources import Profile
from pipelines.planning.estimate import Moments
from pipelines.stages.augment import make_generator
from prag_core.augmentation.augment import augment
from prag_core.augmentation.formats import read_augmentations
from prag_core.config import Config
from prag_core.llm.base_model import load_base_model
from prag_core.llm.threads import compute_here
from prag_core.recipe import Recipe
from prag_core.records import Augmentation, Passage, QAPair, from_dict
from prag_core.store.objects import Store
from prag_core.training.examples import training_examples


@dataclass(frozen=True)
class Measurement:
    """What a sample took one actor: units and seconds, of passages a call to the augmenter, of tokens a stack.

    `load_seconds` is what an actor takes before its first batch.
    """

    augment: Moments
    train: Moments
    tokens: tuple[float, ...]
    load_seconds: float


def planned(passage: Passage, recipe: Recipe) -> Augmentation:
    """Return an augmentation as it may come: each rewrite as long as its passage, each question of 15 words."""
    pair = QAPair("word " * 15, "word " * 3, "")
    return Augmentation(
        passage.key, (passage.text,) * recipe.augment.rewrites, (pair,) * recipe.augment.pairs, "planned"
    )


def measure(
    config: Config, recipe: Recipe, profile: Profile, passages: Sequence[Passage], console: Console
) -> Measurement:
    """Augment and train `passages` on an actor of the profile, in stacks as the job makes them; stores nothing."""
    console.print(f"measuring {len(passages)} passages on one actor")
    actors = profile.train
    remote = ray.remote(_measure).options(num_cpus=actors.cpus, num_gpus=actors.gpus, max_retries=2)
    measured: Measurement = ray.get(remote.remote(config, recipe, profile, list(passages)))
    return measured


def _measure(config: Config, recipe: Recipe, profile: Profile, passages: list[Passage]) -> Measurement:
    from prag_core.training.examples import TrainingJob
    from prag_core.training.trainer import Trainer, make_stacks

    begun = time.perf_counter()
    compute_here(profile.train.threads)
    base = load_base_model(config.model, expected=recipe.base_model)
    # From the recipe's own start: another one trains as fast.
    trainer = Trainer(base, replace(recipe.train, start=""), checkpoint=config.run.checkpoint_activations)
    loaded = time.perf_counter() - begun
    made, augmenting = _augmentations(config, recipe, passages)
    jobs = [
        TrainingJob(passage.key, training_examples(base.tokenizer, passage, augmentation, recipe.train))
        for passage, augmentation in zip(passages, made, strict=True)
    ]
    jobs = [job for job in jobs if job.examples]
    stacks = make_stacks(jobs, profile.tokens_per_step)
    training = []
    for stack in [*stacks[:1], *stacks]:  # the first one twice: kernels are chosen and memory is taken then
        begun = time.perf_counter()
        trained = list(trainer.train(stack, tokens_per_step=profile.tokens_per_step))
        training.append((float(sum(adapter.tokens for adapter in trained)), time.perf_counter() - begun))
    tokens = tuple(float(recipe.train.epochs * job.tokens) for job in jobs)
    return Measurement(Moments.of(augmenting), Moments.of(training[1:]), tokens, loaded)


def _augmentations(
    config: Config, recipe: Recipe, passages: list[Passage]
) -> tuple[list[Augmentation], list[tuple[float, float]]]:
    imported = read_augmentations(config.augment.import_file) if config.augment.import_file else None
    found = {p.key: augmentation for p in passages if imported and (augmentation := imported.find(p)) is not None}
    lacking = [passage for passage in passages if passage.key not in found]
    batches: list[tuple[float, float]] = [(1.0, 0.0)] * len(found)
    if lacking and config.augment.generator != "none":
        generator = make_generator(config)
        size = config.run.augment_batch
        for i in range(0, len(lacking), size):
            begun = time.perf_counter()
            results = augment(lacking[i : i + size], generator, recipe.augment)
            batches.append((float(len(results)), time.perf_counter() - begun))
            found |= {result.key: result for result in results if isinstance(result, Augmentation)}
    return [found.get(passage.key) or planned(passage, recipe) for passage in passages], batches


def stored_moments(store: Store, folder: str, units: str | None, profile: Profile) -> Moments:
    """Return what stored batches took: of each part the seconds, and its units (None: its rows)."""
    parts = [{"part": part} for part in store.list(folder, ".parquet")]
    if not parts:
        return Moments()
    rows = ray.data.from_items(parts, override_num_blocks=min(profile.partitions, len(parts))).map_batches(
        _moments, batch_size=None, batch_format="pyarrow", fn_kwargs={"store": store, "units": units}
    )
    return sum((from_dict(Moments, row) for row in rows.take_all()), Moments())


def _moments(table: pa.Table, store: Store, units: str | None) -> pa.Table:
    def batch(part: str) -> tuple[float, float]:
        columns = store.get_columns(part, [*([units] if units else []), "seconds"])
        return float(pc.sum(columns[units]).as_py() or 0) if units else columns.num_rows, float(
            pc.sum(columns["seconds"]).as_py() or 0
        )

    return pa.Table.from_pylist([asdict(Moments.of(batch(part) for part in table["part"].to_pylist()))])
