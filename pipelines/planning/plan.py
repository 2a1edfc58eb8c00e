"""Plan a run: what is missing and what it will cost, from the store or from a measured sample. Writes nothing."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from cluster.session import ray_session
from pipelines.execution.survey import sample, survey
from pipelines.planning.estimate import Moments, Quantity, exactly, mean
from pipelines.planning.measure import Measurement, measure, obstacle_to_measuring, planned, stored_moments
from pipelines.settings import RunContext, make_context
from pipelines.stages.ingest import ingest
from pipelines.stages.train import passages_per_task
from pipelines.words import counted
from prag_core.config import Config
from prag_core.llm.checkpoint import load_tokenizer, resolve_model
from prag_core.llm.layout import adapter_size_bytes
from prag_core.records import Passage
from prag_core.store.snapshot import forgotten_now
from prag_core.training.examples import training_examples

_SAMPLE = 64
# How many passages are measured unasked where nothing is known, and for how many seconds at most.
_FEW = 4
_FEW_S = 120.0
_UNMEASURED = "no measurements yet"
# The numbers of actors for which the wall time is given, up to the most that the profile allows.
_ACTORS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)

Interval = tuple[float, float]


@dataclass(frozen=True)
class Plan:
    """The work that is missing, and its cost.

    Estimates from a measurement are None if there is none. Each has a 95 % interval (`…_interval`), which is None if
    only one batch was measured. `tokens` are the training tokens over all epochs. `augment_seconds` and
    `train_seconds` are for one actor; `wall_seconds` are by number of actors, without the shuffles and the index.
    `gpu_hours` are for all actors together, and None for a profile without GPUs. `basis` says what was measured.
    """

    records: int
    rejected: dict[str, int]
    passages: int
    duplicates: int
    to_augment: int
    to_train: int
    tokens: int
    tokens_interval: Interval | None
    adapter_bytes: int
    puts: int
    gets: int
    augment_seconds: float | None
    train_seconds: float | None
    wall_seconds: dict[str, float] | None
    wall_seconds_interval: dict[str, Interval] | None
    gpu_hours: float | None
    gpu_hours_interval: Interval | None
    dollars: float | None
    dollars_interval: Interval | None
    recipe: str
    basis: str

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return asdict(self)


def make_plan(
    config: Config, console: Console, *, measured: int | None = None, price_gpu_hour: float | None = None
) -> Plan:
    """Read the corpus, compare it with the store, and estimate the cost of what is missing.

    The seconds per token (training) and per passage (augmenting) come from batches that earlier runs of the recipe
    stored, or from `measured` passages that are augmented and trained now on an actor of the profile. The tokens per
    passage come from the same passages, or are estimated from the texts of `_SAMPLE` passages.

    By default `_FEW` passages are measured where the store knows no times, for `_FEW_S` seconds at most; but not where
    that would hold machines of a cluster or ask an endpoint, which may cost money, nor a model for which the machine is
    too small.

    Args:
        config: The configuration of the run to plan.
        console: Shows the progress.
        measured: The number of passages to measure, whatever it takes; with 0 the times come from the store alone.
        price_gpu_hour: The price of a GPU-hour in dollars.

    Raises:
        ClusterError: when this machine can hold no actor to measure `measured` passages on.
    """
    context = make_context(config)
    store, profile, recipe = context.store, context.profile, context.recipe
    with ray_session(profile):
        console.print("plan: reading the corpus")
        corpus = ingest(config.corpus, profile, forgotten_now(store), config.storage)
        console.print(f"plan: comparing {counted(corpus.count, 'passage')} with the store")
        found = survey(store, corpus.passages, corpus.count, recipe, profile)
        to_augment = found.counts["to_augment"]
        to_train = to_augment + found.counts["to_train"]
        # Only passages that are missing: those that are done may have another length.
        drawn = sample(found, corpus.passages, max(_SAMPLE, measured or 0))
        measurement: Measurement | None = None
        if measured and drawn:
            measurement = measure(context, drawn[:measured], console)
        else:
            augmenting = stored_moments(context, f"augmentations/{recipe.augment.fingerprint}", None)
            training = stored_moments(context, f"adapters/{recipe.fingerprint}/ledger", "tokens")
            basis = f"earlier runs: {counted(training.batches, 'commit')}" if training.batches else _UNMEASURED
            known = training.rate and (augmenting.rate or not to_augment)
            if measured is None and drawn and not known:
                if obstacle := obstacle_to_measuring(context, to_augment):
                    console.print(f"plan: no passages are timed: {obstacle}")
                else:
                    measurement = measure(context, drawn[:_FEW], console, timeout_s=_FEW_S)
        if measurement is not None:
            augmenting, training = measurement.augment, measurement.train
            timed = counted(len(measurement.tokens), "passage")
            basis = f"measured now: {timed} in {counted(training.batches, 'stack')}"
    token_counts = measurement.tokens if measurement and measurement.tokens else _token_counts(context, drawn[:_SAMPLE])
    tokens = (mean(token_counts) if token_counts else exactly(0)).scaled(to_train)
    augment, train = _seconds(augmenting, training, to_augment, tokens)
    total = augment.plus(train) if augment and train else None
    actors = profile.train
    hours = total.scaled(actors.gpus / 3600) if total and actors.gpus else None
    dollars = hours.scaled(price_gpu_hour) if hours and price_gpu_hour is not None else None
    load = measurement.load_seconds if measurement else 0.0
    tasks = math.ceil(to_train / passages_per_task(to_train, context)) if to_train else 0
    batches = math.ceil(to_augment / config.run.augment_batch)
    # More actors than tasks would not be faster.
    numbers = [n for n in _ACTORS if n == 1 or n <= min(actors.max_size, max(tasks, batches))]
    walls = {n: total.scaled(1 / n).plus(exactly(load)) for n in numbers} if total else {}
    return Plan(
        records=corpus.report.taken,
        rejected=dict(corpus.report.rejected),
        passages=corpus.count,
        duplicates=corpus.report.extra["duplicates"],
        to_augment=to_augment,
        to_train=to_train,
        tokens=round(tokens.value),
        tokens_interval=tokens.interval,
        adapter_bytes=to_train * adapter_size_bytes(context.layout, config.storage.adapter_dtype),
        # A task writes a shard and a ledger part, a batch writes an augmentation part. Each first checks whether the
        # part is there and reads its attempts, and a task checks the lease.
        puts=2 * tasks + batches,
        gets=3 * tasks + 2 * batches,
        augment_seconds=augment.value if augment else None,
        train_seconds=train.value if train else None,
        wall_seconds={str(n): wall.value for n, wall in walls.items()} or None,
        wall_seconds_interval={str(n): wall.interval for n, wall in walls.items() if wall.interval} or None,
        gpu_hours=hours.value if hours else None,
        gpu_hours_interval=hours.interval if hours else None,
        dollars=dollars.value if dollars else None,
        dollars_interval=dollars.interval if dollars else None,
        recipe=recipe.fingerprint,
        basis=basis,
    )


def _seconds(
    augmenting: Moments, training: Moments, to_augment: int, tokens: Quantity
) -> tuple[Quantity | None, Quantity | None]:
    """Return the seconds of one actor for augmenting and for training; None if nothing was measured."""
    per_passage, per_token = augmenting.rate, training.rate
    augment = exactly(0) if not to_augment else per_passage and per_passage.scaled(to_augment)
    train = exactly(0) if not tokens.value else per_token and per_token.times(tokens)
    return augment, train


def _token_counts(context: RunContext, passages: list[Passage]) -> tuple[float, ...]:
    """Return the training tokens of each passage with a typical augmentation."""
    tokenizer, recipe = load_tokenizer(resolve_model(context.config.model.name)), context.recipe
    counts = []
    for passage in passages:
        examples = training_examples(tokenizer, passage, planned(passage, recipe), recipe.train)
        counts.append(float(recipe.train.epochs * sum(len(example.ids) for example in examples)))
    return tuple(counts)
