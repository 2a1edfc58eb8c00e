"""Measure the cost of a job: augment and train a sample of passages on the machine that will run it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import ray
from rich.console import Console
from rich.filesize import decimal

from cluster.preflight import on_cluster
from pipelines.execution.tables import map_objects
from pipelines.planning.estimate import Moments
from pipelines.settings import RunContext
from pipelines.stages.augment import make_generator
from pipelines.words import counted, duration
from prag_core.augmentation.augment import augment, complete, expected_pairs, lacks_pairs
from prag_core.augmentation.formats import read_augmentations
from prag_core.errors import ClusterError
from prag_core.llm.base_model import load_base_model
from prag_core.llm.checkpoint import resolve_model
from prag_core.llm.model_facts import parameter_count
from prag_core.llm.threads import compute_here
from prag_core.recipe import Recipe
from prag_core.records import Augmentation, Passage, QAPair, from_dict
from prag_core.store.objects import Store
from prag_core.training.examples import training_examples


@dataclass(frozen=True)
class Measurement:
    """The times of a sample on one actor.

    `augment` sums over batches of passages, `train` over stacks of training tokens. `tokens` are the training tokens
    of each passage. `load_seconds` is the time before an actor's first batch.
    """

    augment: Moments
    train: Moments
    tokens: tuple[float, ...]
    load_seconds: float


def planned(passage: Passage, recipe: Recipe) -> Augmentation:
    """Return a typical augmentation: each rewrite is as long as the passage, each question has 15 words."""
    # The key makes each passage's examples its own, without which they would be trained once for all.
    pair = QAPair(f"{passage.key} " + "word " * 14, "word " * 3, "")
    pairs = (pair,) * expected_pairs(passage, recipe.augment)
    return Augmentation(passage.key, (passage.text,) * recipe.augment.rewrites, pairs, "planned")


def obstacle_to_measuring(context: RunContext, to_augment: int) -> str:
    """Return why passages should not be measured unless somebody asks for it; empty if nothing speaks against it."""
    if on_cluster():
        return "it would hold a machine of the cluster"
    if to_augment and context.config.augment.generator == "openai":
        return "it would ask the endpoint"
    if lack := _lack(context):
        return lack
    weights = 4 * parameter_count(resolve_model(context.config.model.name))
    if not context.profile.train.gpus and weights > psutil.virtual_memory().available / 2:
        return f"the model needs {decimal(weights)} of memory"
    return ""


def _lack(context: RunContext) -> str:
    """Return which resource of an actor this machine lacks, where Ray was started on it; empty if none."""
    actors = context.profile.train
    here: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, wanted in (("CPU", actors.cpus), ("GPU", actors.gpus)):
        if not on_cluster() and here.get(name, 0) < wanted:
            return f"an actor takes {wanted:g} {name}, this machine has {here.get(name, 0):g}"
    return ""


def measure(
    context: RunContext, passages: Sequence[Passage], console: Console, timeout_s: float | None = None
) -> Measurement | None:
    """Augment and train `passages` on one actor of the profile, in the same stacks as the job; store nothing.

    Returns None when that takes longer than `timeout_s`.

    Raises:
        ClusterError: when this machine can hold no such actor.
    """
    limit = "" if timeout_s is None else f", for {duration(timeout_s)} at most; --measure 0 leaves it out"
    console.print(f"plan: timing {counted(len(passages), 'passage')} on one actor{limit}")
    if lack := _lack(context):
        raise ClusterError(f"no passage can be measured here: {lack}", "use --profile laptop, or --measure 0")
    actors = context.profile.train
    remote = ray.remote(_measure).options(num_cpus=actors.cpus, num_gpus=actors.gpus, max_retries=2)
    reference = remote.remote(context, list(passages))
    try:
        measured: Measurement = ray.get(reference, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(reference, force=True)
        console.print(f"plan: stopped timing after {duration(timeout_s or 0)}")
        return None
    return measured


def _measure(context: RunContext, passages: list[Passage]) -> Measurement:
    from prag_core.training.examples import TrainingJob
    from prag_core.training.trainer import Trainer, make_stacks

    config, recipe, profile = context.config, context.recipe, context.profile
    begun = time.perf_counter()
    compute_here(profile.train.threads)
    base = load_base_model(config.model, expected=recipe.base_model, gpus=profile.train.gpus)
    # Without the initial adapter of the recipe: the time is the same.
    trainer = Trainer(base, replace(recipe.train, start=""), checkpoint=config.run.checkpoint_activations)
    loaded = time.perf_counter() - begun
    augmentations, augmenting = _augmentations(context, passages)
    jobs = [
        TrainingJob(passage.key, training_examples(base.tokenizer, passage, augmentation, recipe.train))
        for passage, augmentation in zip(passages, augmentations, strict=True)
    ]
    jobs = [job for job in jobs if job.examples]
    stacks = make_stacks(jobs, profile.tokens_per_step)
    training = []
    for stack in [
        *stacks[:1],
        *stacks,
    ]:  # the first one twice: it is slower, since kernels are chosen and memory is taken
        begun = time.perf_counter()
        trained = list(trainer.train(stack, tokens_per_step=profile.tokens_per_step))
        training.append((float(sum(adapter.tokens for adapter in trained)), time.perf_counter() - begun))
    tokens = tuple(float(recipe.train.epochs * job.tokens) for job in jobs)
    return Measurement(Moments.of(augmenting), Moments.of(training[1:]), tokens, loaded)


def _augmentations(
    context: RunContext, passages: list[Passage]
) -> tuple[list[Augmentation], list[tuple[float, float]]]:
    """Return an augmentation of each passage, and the (passages, seconds) of each batch."""
    config, recipe = context.config, context.recipe
    file = config.augment.import_file
    imported = read_augmentations(file, config.storage) if file else None
    found, given = {}, {}
    for passage in passages:
        if imported and (augmentation := imported.find(passage)) is not None:
            if lacks_pairs(augmentation, recipe.augment):
                given[passage.key] = augmentation
            else:
                found[passage.key] = complete(passage, augmentation, recipe.augment)
    missing = [passage for passage in passages if passage.key not in found]
    batches: list[tuple[float, float]] = [(1.0, 0.0)] * len(found)
    if missing and config.augment.generator != "none":
        results = augment(missing, make_generator(config, context.profile.train.gpus), recipe.augment, given)
        made = [result for result in results if isinstance(result, Augmentation)]
        size = config.run.augment_batch
        # `seconds` is the time since the augmentation before, so that of several together is theirs.
        groups = [made[i : i + size] for i in range(0, len(made), size)]
        batches += [(float(len(group)), sum(result.seconds for result in group)) for group in groups]
        found |= {result.key: result for result in made}
    return [found.get(passage.key) or planned(passage, recipe) for passage in passages], batches


def stored_moments(context: RunContext, folder: str, units: str | None) -> Moments:
    """Return the units and seconds of stored batches, one batch a part; without a column `units`, rows are units."""
    parts = context.store.list(folder, ".parquet")
    if not parts:
        return Moments()
    batches = map_objects(parts, context.profile.partitions, partial(_moments, context.store, units))
    return sum((from_dict(Moments, row) for row in batches.take_all()), Moments())


def _moments(store: Store, units: str | None, part: str) -> pa.Table:
    columns = store.get_columns(part, [*([units] if units else []), "seconds"])
    done = pc.sum(columns[units]).as_py() if units else columns.num_rows
    batch = float(done or 0), float(pc.sum(columns["seconds"]).as_py() or 0)
    return pa.Table.from_pylist([asdict(Moments.of([batch]))])
