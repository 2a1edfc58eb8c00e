"""From a configuration to the recipe that it means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipelines.augment import generator_fingerprint
from prag_core.adapter_store import start_fingerprint
from prag_core.config import Config
from prag_core.identity import is_checksum
from prag_core.layout import LoraLayout, find_layout
from prag_core.models import model_facts, resolve_model
from prag_core.recipe import Recipe, augment_recipe, train_recipe


def describe(config: Config) -> tuple[Recipe, LoraLayout]:
    """Return the recipe that a configuration means and the layout of its adapters; loads no weights.

    Raises:
        ModelError: when the model is missing or does not fit.
        AdapterError: when `train.start` is no adapter of the recipe's shape.
    """
    train = train_recipe(config.train)
    folder = resolve_model(config.model.name)
    facts = model_facts(folder)
    layout = find_layout(facts.linear, train)
    if start := config.train.start:
        train = replace(train, start=start if is_checksum(start) else _fingerprint_of(layout, Path(start)))
    augmenting = augment_recipe(config.augment, generator_fingerprint(config, facts.fingerprint))
    return Recipe(facts.fingerprint, augmenting, train), layout


def _fingerprint_of(layout: LoraLayout, start: Path) -> str:
    from prag_core.adapter_io import import_peft

    return start_fingerprint(import_peft(layout, start))
