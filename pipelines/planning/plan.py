"""What a run would do and what it would cost, from what is in the store or from a measured sample. Writes nothing."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from cluster.session import ray_session
from pipelines.execution.survey import sample, survey
from pipelines.planning.estimate import Moments, Quantity, exactly, mean
from pipelines.planning.measure import Measurement, measure, planned, stored_moments
from pipelines.settings import describe, profile_of
from pipelines.stages import ingest
from pipelines.stages.train import passages_a_task
from prag_core.config import Config
from prag_core.llm.checkpoint import load_tokenizer, resolve_model
from prag_core.llm.layout import adapter_size_bytes
from prag_core.recipe import Recipe
from prag_core.records import Passage
from prag_core.store.objects import open_store
from prag_core.store.snapshot import forgotten_now
from prag_core.training.examples import training_examples

_SAMPLE = 64
# The numbers of actors for which the wall time is told, up to what the profile allows.
_ACTORS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)

Interval = tuple[float, float]


@dataclass(frozen=True)
class Plan:
    """What is to be done, and what it takes.

    What rests on a measurement is None where there is none, and comes with a 95 % interval (`…_interval`), None
    where one batch alone was measured. `tokens` are those of training over all epochs; `augment_seconds` and
    `train_seconds` are of one actor; `wall_seconds` are by number of actors, without the shuffles and the index;
    `gpu_hours` are those of all actors, and None for a profile without GPUs. `basis` says what was measured.
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


def make_plan(config: Config, console: Console, *, measured: int = 0, price_gpu_hour: float | None = None) -> Plan:
    """Read the corpus, compare it with the store, and estimate what is missing.

    Seconds a token (training) and a passage (augmenting) come from the batches that earlier runs of the recipe have
    stored, or from `measured` passages, augmented and trained now on an actor of the profile. The tokens of a
    passage come from the same sample, or are estimated from the texts of `_SAMPLE` passages.

    Args:
        config: What would be run.
        console: Is told what is going on.
        measured: How many passages to try; 0 rests on what the store holds.
        price_gpu_hour: What an hour of a GPU costs.
    """
    store = open_store(config)
    profile = profile_of(config)
    recipe, layout = describe(config)
    with ray_session(profile):
        corpus = ingest.ingest(config.corpus, profile, forgotten_now(store))
        found = survey(store, corpus.passages, corpus.count, recipe, profile)
        counts = found.counts
        to_augment = counts["to_augment"]
        to_train = to_augment + counts["to_train"]
        # Of what is missing: what is there already may be of another length.
        drawn = sample(found, corpus.passages, max(_SAMPLE, measured))
        tried: Measurement | None = None
        if measured and drawn:
            tried = measure(config, recipe, profile, drawn[:measured], console)
            augmenting, training = tried.augment, tried.train
            basis = f"measured now: {len(tried.tokens)} passages in {training.batches} stacks"
        else:
            augmenting = stored_moments(store, f"augmentations/{recipe.augment.fingerprint}", None, profile)
            training = stored_moments(store, f"adapters/{recipe.fingerprint}/ledger", "tokens", profile)
            basis = f"what earlier runs stored: {training.batches} commits" if training.batches else "nothing measured"
    counted = tried.tokens if tried and tried.tokens else _tokens_each(config, recipe, drawn[:_SAMPLE])
    tokens = (mean(counted) if counted else exactly(0)).scaled(to_train)
    cost = _cost(augmenting, training, to_augment, tokens)
    actors = profile.train
    hours = cost["all"].scaled(actors.gpus / 3600) if cost["all"] and actors.gpus else None
    dollars = hours.scaled(price_gpu_hour) if hours and price_gpu_hour is not None else None
    load = tried.load_seconds if tried else 0.0
    tasks = math.ceil(to_train / passages_a_task(to_train, config, profile, layout)) if to_train else 0
    batches = math.ceil(to_augment / config.run.augment_batch)
    # More actors than tasks would not be faster.
    numbers = [n for n in _ACTORS if n == 1 or n <= min(actors.most, max(tasks, batches))]
    walls = {n: cost["all"].scaled(1 / n).plus(exactly(load)) for n in numbers} if cost["all"] else {}
    return Plan(
        records=corpus.report.taken,
        rejected=dict(corpus.report.rejected),
        passages=corpus.count,
        duplicates=corpus.report.extra["duplicates"],
        to_augment=to_augment,
        to_train=to_train,
        tokens=round(tokens.value),
        tokens_interval=tokens.interval,
        adapter_bytes=to_train * adapter_size_bytes(layout, config.storage.adapter_dtype),
        # A shard and a ledger part a task, an augmentation part a batch; each looks first whether it is there and
        # whether it lost a worker before, and a task whether its run still holds the lease.
        puts=2 * tasks + batches,
        gets=3 * tasks + 2 * batches,
        augment_seconds=cost["augment"].value if cost["augment"] else None,
        train_seconds=cost["train"].value if cost["train"] else None,
        wall_seconds={str(n): wall.value for n, wall in walls.items()} or None,
        wall_seconds_interval={str(n): wall.interval for n, wall in walls.items() if wall.interval} or None,
        gpu_hours=hours.value if hours else None,
        gpu_hours_interval=hours.interval if hours else None,
        dollars=dollars.value if dollars else None,
        dollars_interval=dollars.interval if dollars else None,
        recipe=recipe.fingerprint,
        basis=basis,
    )


def _cost(augmenting: Moments, training: Moments, to_augment: int, tokens: Quantity) -> dict[str, Quantity | None]:
    """Return the seconds of one actor for augmenting, for training, and for both; None where nothing tells."""
    a_passage, a_token = augmenting.rate, training.rate
    augment = exactly(0) if not to_augment else a_passage and a_passage.scaled(to_augment)
    train = exactly(0) if not tokens.value else a_token and a_token.times(tokens)
    return {"augment": augment, "train": train, "all": augment.plus(train) if augment and train else None}


def _tokens_each(config: Config, recipe: Recipe, sample: list[Passage]) -> tuple[float, ...]:
    tokenizer = load_tokenizer(resolve_model(config.model.name))
    counts = []
    for passage in sample:
        examples = training_examples(tokenizer, passage, planned(passage, recipe), recipe.train)
        counts.append(float(recipe.train.epochs * sum(len(example.ids) for example in examples)))
    return tuple(counts)
