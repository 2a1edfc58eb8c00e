"""Recipes: all settings that decide what an augmentation or an adapter is.

The store keeps what a recipe made under the recipe's fingerprint, with the whole recipe beside it. Machine facts (batch
size, device, number of actors, paths) never enter a recipe. Raise `RULE_VERSION` when code changes a recipe's result.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from prag_core.identity import fingerprint
from prag_core.prompts import PROMPT_VERSION
from prag_core.records import Template

RULE_VERSION = 5

Schedule = Literal["constant", "linear"]


@dataclass(frozen=True, slots=True)
class AugmentRecipe:
    """The settings that decide an augmentation.

    `generator` is the fingerprint of the augmenting model's weights. With `cloze`, cloze questions on facts that no
    pair asks about fill up the pairs. With `complete_imports`, the writer first adds pairs to imported ones.
    """

    generator: str
    strategy: str
    pairs: int
    rewrites: int
    attempts: int
    seed: int
    imported: bool
    cloze: bool = False
    complete_imports: bool = False
    prompt_version: int = PROMPT_VERSION
    rule_version: int = RULE_VERSION

    @property
    def fingerprint(self) -> str:
        """Return the hash of this recipe's canonical JSON, which names it in the store."""
        return fingerprint(_without(asdict(self), _ADDED_TO_AUGMENT))


@dataclass(frozen=True, slots=True)
class TrainRecipe:
    """The settings that decide an adapter, given a base model and augmentations.

    `examples` is `paper` or `questions`, see `prag_core.training.examples.training_examples`. `template` is how
    questions are asked, see `prag_core.prompts`. `eos` ends each target with the model's end-of-turn token. The `loss`
    counts `all` tokens of an example, as in the paper, or its `answer` and end alone. With `rate_width`, the
    `learning_rate` is for a model of this hidden size, see `rate_for`. By its `schedule`, the rate is the same in all
    steps (`constant`), or falls in a straight line over a passage's own steps (`linear`). Each step trains
    `examples_per_step` of a passage's examples. `last_layers` is how many layers are adapted, counted from the output,
    or None for all; with fewer, adapters are smaller and no backward pass goes below them. `start` is the fingerprint
    of the factors that all adapters start from, such as a warm-up's; if empty, they start from random factors of
    `seed`. `without` is the paper's ablation: leave out the `rewrites`, the `qa` pairs, or `both`.
    """

    # Field names are part of the fingerprint and of the stored JSON. So `start` and `without` keep theirs, although the
    # configuration calls them `initial_adapter` and `ablation`.

    name: str
    rank: int = 2
    alpha: float = 32.0
    targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    learning_rate: float = 3e-4
    rate_width: int = 0
    schedule: Schedule = "constant"
    weight_decay: float = 0.01
    epochs: int = 1
    examples_per_step: int = 1
    examples: str = "paper"
    template: Template = "direct"
    eos: bool = False
    loss: str = "all"
    last_layers: int | None = None
    max_tokens: int = 3000
    seed: int = 0
    start: str = ""
    without: str = ""

    @property
    def scale(self) -> float:
        """The factor of B·A: alpha / rank."""
        return self.alpha / self.rank

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> TrainRecipe:
        """Return the recipe of a document that `asdict` made, as a store keeps it."""
        return cls(**{**document, "targets": tuple(document["targets"])})

    def rate_for(self, width: int) -> float:
        """Return the learning rate for a model of hidden size `width`; models wider than `rate_width` need less."""
        return self.learning_rate * min(1.0, (self.rate_width or width) / width) ** 2


RECIPES: dict[str, TrainRecipe] = {
    # Su et al., SIGIR 2025, section 4.1 and the authors' published settings.
    "paper": TrainRecipe(name="paper"),
    # Each question is trained as it will be asked, and nothing but its answer is learned. What all adapters would learn
    # alike, such as the prompt's wording, would add up in their sum and drown the answer.
    "recall": TrainRecipe(
        name="recall",
        examples="questions",
        template="brief",
        loss="answer",
        eos=True,
        learning_rate=1e-3,
        rate_width=576,
        schedule="linear",
        epochs=5,
    ),
}

# Fields that were added after adapters had been stored. At their defaults they are left out of the fingerprint, so that
# older adapters keep theirs.
_ADDED_TO_AUGMENT: dict[str, Any] = {"cloze": False, "complete_imports": False}
_ADDED_TO_TRAIN: dict[str, Any] = {
    "template": "direct",
    "without": "",
    "rate_width": 0,
    "examples_per_step": 1,
    "schedule": "constant",
}


def _without(fields: dict[str, Any], added: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe but those that were added and have their default."""
    return {name: value for name, value in fields.items() if name not in added or value != added[name]}


@dataclass(frozen=True, slots=True)
class Recipe:
    """The full recipe of an adapter: base model, augmentations and training."""

    base_model: str
    augment: AugmentRecipe
    train: TrainRecipe
    prompt_version: int = PROMPT_VERSION
    rule_version: int = RULE_VERSION

    @property
    def fingerprint(self) -> str:
        """Return the hash of this recipe's canonical JSON, which names it in the store."""
        content = self.to_json()
        content["augment"] = _without(content["augment"], _ADDED_TO_AUGMENT)
        content["train"] = _without(content["train"], _ADDED_TO_TRAIN)
        return fingerprint(content)

    def to_json(self) -> dict[str, Any]:
        """Return the whole recipe as the store keeps it."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Recipe:
        """Return the recipe of a document that `to_json` made."""
        parts = {
            "augment": AugmentRecipe(**document["augment"]),
            "train": TrainRecipe.from_json(document["train"]),
        }
        return cls(**{**document, **parts})
