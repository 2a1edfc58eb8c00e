"""Writers: adapters with which a model writes questions, in a store or packaged with the project."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prag_core.errors import AdapterError, ConfigError, DamagedError
from prag_core.identity import fingerprint
from prag_core.packaged import local_path
from prag_core.recipe import AugmentRecipe, TrainRecipe
from prag_core.store.adapters import get_start
from prag_core.store.objects import Store

if TYPE_CHECKING:
    from prag_core.llm.lora import Factors

# A folder in the form of a store, with the writers that come with the project.
_PACKAGED = "package://pipelines/examples/writer"
WRITER_REMEDY = "train one with `prag warmup --asking`, and set augment.writer to the name that it prints"


@dataclass(frozen=True)
class Writer:
    """The adapter with which a model writes questions: its name, the store that holds it, and its recipe."""

    name: str
    store: Store
    recipe: TrainRecipe

    def adapter(self) -> tuple[TrainRecipe, Factors]:
        """Return its recipe and its factors, as a generator takes them.

        Raises:
            ConfigError: when the factors are missing or altered.
        """
        try:
            return self.recipe, get_start(self.store, self.name)
        except AdapterError as error:
            raise ConfigError(f"augment.writer = {self.name!r}: {error.message}", WRITER_REMEDY) from None

    def augment_recipe(self, recipe: AugmentRecipe, *, complete_imports: bool = False) -> AugmentRecipe:
        """Return the recipe of augmentations that this writer makes; it is a part of the model that augments.

        `complete_imports` says whether it adds pairs to imported ones.
        """
        return replace(
            recipe,
            strategy="writer",
            generator=fingerprint([recipe.generator, self.name]),
            complete_imports=complete_imports and recipe.imported,
        )


def find_writer(store: Store, name: str, model: str) -> Writer:
    """Return the writer of a store with this name, for the model with this fingerprint.

    Raises:
        ConfigError: when the store has none, or it is another model's.
    """
    try:
        about = store.get_json(f"starts/{name}.json")
    except DamagedError as error:
        raise ConfigError(f"augment.writer = {name!r}: {error.message}", WRITER_REMEDY) from None
    if about["base_model"] != model or not about["settings"].get("asking"):
        raise ConfigError(f"augment.writer = {name!r} is no writer of the model that augments", WRITER_REMEDY)
    return Writer(name, store, TrainRecipe.from_json(about["recipe"]))


def packaged_writer(model: str) -> Writer | None:
    """Return the writer that comes with the project for the model with this fingerprint; None when there is none."""
    store = Store(local_path(_PACKAGED))
    for note in store.list("starts", ".json"):
        if store.get_json(note)["base_model"] == model:
            return find_writer(store, note.removeprefix("starts/").removesuffix(".json"), model)
    return None
