"""What a configuration means: the recipe, the layout of the adapters, the machine profile, the store."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from cluster.resources import PROFILES, Actors, Profile
from prag_core.config import ActorsConfig, Config, ModelConfig, augment_recipe, train_recipe
from prag_core.errors import ConfigError
from prag_core.identity import is_checksum
from prag_core.llm.checkpoint import resolve_model
from prag_core.llm.layout import LoraLayout, find_layout
from prag_core.llm.model_facts import ModelFacts, model_facts, model_fingerprint
from prag_core.llm.threads import available_cores
from prag_core.recipe import Recipe
from prag_core.store.adapters import start_fingerprint
from prag_core.store.objects import Store, open_store
from prag_core.store.writers import WRITER_REMEDY, Writer, find_writer, packaged_writer

T = TypeVar("T")


@dataclass(frozen=True)
class RunContext:
    """What all stages of a run share; it is made once and passed on.

    `run` is the id of the run, and empty where none is recorded (a plan, an evaluation).
    """

    config: Config
    store: Store
    profile: Profile
    recipe: Recipe
    layout: LoraLayout
    run: str = ""


def make_context(config: Config, run: str = "") -> RunContext:
    """Open the configured store and find out the recipe; loads no weights.

    Raises:
        StoreError: when the store cannot be opened.
        ModelError: see `describe`.
        AdapterError: see `describe`.
    """
    recipe, layout = describe(config)
    return RunContext(config, open_store(config), profile_of(config), recipe, layout, run)


def describe(config: Config) -> tuple[Recipe, LoraLayout]:
    """Return the recipe of a configuration and the layout of its adapters; loads no weights.

    Raises:
        ModelError: when the model is missing or does not fit the recipe.
        ConfigError: when the strategy `writer` is chosen without a writer or a model that runs here.
        AdapterError: when `train.initial_adapter` names no adapter of the recipe's shape.
    """
    train = train_recipe(config.train)
    folder = resolve_model(config.model.name)
    facts = model_facts(folder)
    layout = find_layout(facts.linear, train)
    if start := config.train.initial_adapter:
        train = replace(train, start=start if is_checksum(start) else _fingerprint_of(config, facts, layout))
    generator, writer = generator_fingerprint(config, facts.fingerprint), writer_of(config, facts.fingerprint)
    augmenting = augment_recipe(config.augment, generator, train)
    if writer is not None:
        augmenting = writer.augment_recipe(augmenting, complete_imports=config.augment.complete_imports)
    return Recipe(facts.fingerprint, augmenting, train), layout


def _fingerprint_of(config: Config, facts: ModelFacts, layout: LoraLayout) -> str:
    from prag_core.llm.peft import import_peft, peft_base

    folder = Path(str(config.train.initial_adapter))
    return start_fingerprint(import_peft(layout, folder, peft_base(config.model.name, facts)))


def generator_fingerprint(config: Config, base_model: str) -> str:
    """Return the name of the model that augments: the fingerprint of its weights, or an endpoint's model name.

    `base_model` is the fingerprint of the base model, which augments when the configuration names no other model.
    """
    settings = config.augment
    if settings.generator == "none":
        return "none"
    if settings.generator == "openai":
        return f"openai:{settings.endpoint.model}"
    name = augmenting_model(config)
    return base_model if name == config.model.name else model_fingerprint(resolve_model(name))


def augmenting_model(config: Config) -> str:
    """Return the name of the local model that augments.

    By default it is the base model. Where imports are to be completed, it is the packaged model, which has a writer,
    unless the configuration names a writer of the base model.
    """
    settings = config.augment
    completes = settings.import_file is not None and settings.complete_imports and settings.generator == "transformers"
    if settings.model is None and completes and settings.strategy in (None, "writer") and settings.writer is None:
        return str(ModelConfig.model_fields["name"].default)
    return settings.model or config.model.name


def writer_of(config: Config, base_model: str) -> Writer | None:
    """Return the writer that a configuration names, or the packaged one of the augmenting model.

    None when the configuration names another strategy or generator, or names nothing and the model has no writer.

    Raises:
        ConfigError: when the strategy `writer` is named without a writer, or with another generator than a local model,
            or when the store has no such writer, or one of another model.
    """
    settings = config.augment
    if settings.strategy not in (None, "writer"):
        return None
    if settings.generator == "transformers":
        model = generator_fingerprint(config, base_model)
        if settings.writer is not None:
            return find_writer(open_store(config), settings.writer, model)
        if (writer := packaged_writer(model)) is not None:
            return writer
    if settings.strategy == "writer":
        raise ConfigError("augment.strategy is writer, but there is no writer of this model", WRITER_REMEDY)
    return None


def profile_of(config: Config) -> Profile:
    """Return the profile that a configuration names, changed by the numbers in its section `run`.

    A stage that computes nothing on a GPU holds none: one whose model is on the CPU, and augmenting that asks an
    endpoint or only imports.
    """
    run, profile, cores = config.run, PROFILES[config.run.profile], available_cores()
    on_gpu = config.model.device != "cpu"
    augments_on_gpu = on_gpu and config.augment.generator in ("transformers", "vllm")

    def actors(pool: Actors, own: ActorsConfig, *, on_gpu: bool) -> Actors:
        gpus = _first(own.actor_gpus, run.actor_gpus) if on_gpu else _first(own.actor_gpus, 0.0)
        return pool.tuned(
            min_size=_first(own.actors_min, run.actors_min),
            max_size=_first(own.actors_max, run.actors_max),
            cpus=_first(own.actor_cpus, run.actor_cpus),
            gpus=gpus,
            cores=cores,
        )

    return replace(
        profile.tuned(partitions=run.partitions, tokens_per_step=run.tokens_per_step),
        augment=actors(profile.augment, run.augment, on_gpu=augments_on_gpu),
        train=actors(profile.train, run.train, on_gpu=on_gpu),
        answer=actors(profile.answer, run.answer, on_gpu=on_gpu),
        index_cpus=profile.index_cpus if run.actor_cpus is None else min(profile.index_cpus, run.actor_cpus),
    )


def _first(own: T | None, general: T | None) -> T | None:
    return general if own is None else own
