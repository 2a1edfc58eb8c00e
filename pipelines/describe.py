"""From a configuration to the recipe that it means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipelines.augment import generator_fingerprint
from prag_core.adapter_io import import_peft
from prag_core.adapter_store import start_fingerprint
from prag_core.config import Config
from prag_core.identity import is_start_name
from prag_core.lora import LoraLayout, find_targets
from prag_core.models import model_fingerprint, model_skeleton, resolve_model
from prag_core.recipe import Recipe, augment_recipe, train_recipe


def describe(config: Config) -> tuple[Recipe, LoraLayout]:
    """Return the recipe that a configuration means and the layout of its adapters; loads no weights.

    Raises:
        ModelError: when the model is missing or does not fit.
        AdapterError: when `train.start` is no adapter of the recipe's shape.
    """
    train = train_recipe(config.train)
    folder = resolve_model(config.model.name)
    layout, _ = find_targets(model_skeleton(folder), train)
    if start := config.train.start:
        named = is_start_name(start)
        train = replace(train, start=start if named else start_fingerprint(import_peft(layout, Path(start))))
    base_model = model_fingerprint(folder)
    augmenting = augment_recipe(config.augment, generator_fingerprint(config, base_model))
    return Recipe(base_model, augmenting, train), layout
