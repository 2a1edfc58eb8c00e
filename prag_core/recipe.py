"""Recipes: everything that decides what an augmentation or an adapter is, by name and in full.

A recipe's fingerprint is in the path of what it made, and the recipe itself lies beside it. Machine facts (batch
size, device, number of actors, paths) never enter it. A rule whose outcome changes raises `RULE_VERSION`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from prag_core.identity import fingerprint
from prag_core.prompts import PROMPT_VERSION
from prag_core.records import Template

RULE_VERSION = 1


@dataclass(frozen=True, slots=True)
class AugmentRecipe:
    """What decides an augmentation. `generator` names the augmenting model by its weights' fingerprint."""

    generator: str
    strategy: str
    pairs: int
    rewrites: int
    attempts: int
    seed: int
    imported: bool
    prompt_version: int = PROMPT_VERSION
    rule_version: int = RULE_VERSION

    @property
    def fingerprint(self) -> str:
        """Return the name of this recipe: the hash of its canonical JSON."""
        return fingerprint(asdict(self))


@dataclass(frozen=True, slots=True)
class TrainRecipe:
    """What decides an adapter, once base model and augmentations are given.

    `examples` is the set of training examples a passage: `paper` or `closed_book`, see
    `prag_core.training.examples.training_examples`. `template` is how questions are asked, in training and in answering:
    `direct` or `chain_of_thought`, see `prag_core.prompts`. `eos` ends each target with the model's end-of-turn
    token. `loss` is over `all` tokens of an example, as in the paper, or over its `answer` alone. `last_layers`
    adapts only so many of the topmost layers (None: all): smaller adapters, and no backward pass below them. `start`
    is the fingerprint of the factors that each adapter starts from, such as a warm-up's; empty for those of `seed`.
    `without` is the paper's ablation: leave out the `rewrites`, the `qa` pairs, or `both`.
    """

    name: str
    rank: int = 2
    alpha: float = 32.0
    targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    epochs: int = 1
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
        """The factor of B·A in the weights: alpha / rank."""
        return self.alpha / self.rank


RECIPES: dict[str, TrainRecipe] = {
    # Su et al., SIGIR 2025, section 4.1 and the authors' published settings.
    "paper": TrainRecipe(name="paper"),
    # For models of some hundred million parameters, on which the paper's one gentle pass leaves no trace.
    "small": TrainRecipe(name="small", learning_rate=1e-3, epochs=4, eos=True),
    # More on fewer tokens: most questions are trained as they will be asked, without the passage, in bigger steps.
    "closed_book": TrainRecipe(name="closed_book", learning_rate=2e-3, epochs=2, eos=True, examples="closed_book"),
}

# Fields that came after the first adapters were made: at their defaults they are no part of a recipe's name, or each
# of those adapters would have to be made again.
_ADDED: dict[str, Any] = {"template": "direct", "without": ""}


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
        """Return the name of this recipe: the hash of its canonical JSON."""
        content = self.to_json()
        for name, default in _ADDED.items():
            if content["train"][name] == default:
                del content["train"][name]
        return fingerprint(content)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe in full, as the store keeps it beside what it made."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Recipe:
        """Return the recipe that `to_json` gave."""
        train = {**document["train"], "targets": tuple(document["train"]["targets"])}
        parts = {"augment": AugmentRecipe(**document["augment"]), "train": TrainRecipe(**train)}
        return cls(**{**document, **parts})
