"""From a configuration to the recipe that it means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cluster.resources import PROFILES, Profile
from prag_core.config import Config, augment_recipe, train_recipe
from prag_core.identity import is_checksum
from prag_core.llm.checkpoint import resolve_model
from prag_core.llm.layout import LoraLayout, find_layout
from prag_core.llm.model_facts import model_facts, model_fingerprint
from prag_core.recipe import Recipe
from prag_core.store.adapters import start_fingerprint


def describe(config: Config) -> tuple[Recipe, LoraLayout]:
    """Return the recipe that a configuration means and the layout of its adapters; loads no weights.

    Raises:
        ModelError: when the model is missing or does not fit.
        AdapterError: when `train.initial_adapter` is no adapter of the recipe's shape.
    """
    train = train_recipe(config.train)
    folder = resolve_model(config.model.name)
    facts = model_facts(folder)
    layout = find_layout(facts.linear, train)
    if start := config.train.initial_adapter:
        train = replace(train, start=start if is_checksum(start) else _fingerprint_of(layout, Path(start)))
    augmenting = augment_recipe(config.augment, generator_fingerprint(config, facts.fingerprint))
    return Recipe(facts.fingerprint, augmenting, train), layout


def _fingerprint_of(layout: LoraLayout, start: Path) -> str:
    from prag_core.llm.peft import import_peft

    return start_fingerprint(import_peft(layout, start))


def generator_fingerprint(config: Config, base_model: str) -> str:
    """Return the name of the model that augments: its weights' fingerprint, or an endpoint's model name.

    `base_model` is the fingerprint of the base model, which augments where no other is named.
    """
    settings = config.augment
    if settings.generator == "none":
        return "none"
    if settings.generator == "openai":
        return f"openai:{settings.endpoint.model}"
    return model_fingerprint(resolve_model(settings.model)) if settings.model else base_model


def profile_of(config: Config) -> Profile:
    """Return the profile that a configuration names, with what its section `run` says in place of the profile's."""
    run = config.run
    return PROFILES[run.profile].tuned(
        actors_min=run.actors_min,
        actors_max=run.actors_max,
        actor_cpus=run.actor_cpus,
        actor_gpus=run.actor_gpus,
        partitions=run.partitions,
        tokens_per_step=run.tokens_per_step,
    )
