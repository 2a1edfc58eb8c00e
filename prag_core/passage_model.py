"""A model that learns passages one by one and answers questions about them: Parametric RAG in a few lines of Python.

It takes the steps of the pipeline with the pipeline's defaults, but needs no Ray, no store and no index: the caller
names the passages of a question. For a whole corpus, `prag run` fills a store, and `prag_core.inference.engine` answers
from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from prag_core.augmentation.augment import augment, complete
from prag_core.config import AugmentConfig, ModelConfig, augment_recipe
from prag_core.errors import AdapterError, ConfigError, InputError
from prag_core.identity import passage_key
from prag_core.inference.engine import Engine
from prag_core.inference.processor import RequestProcessor
from prag_core.inference.request import Request
from prag_core.llm.adapter_card import AdapterCard, write_card
from prag_core.llm.base_model import load_base_model
from prag_core.llm.generator import Generator, TransformersGenerator
from prag_core.llm.lora import TrainedAdapter, find_targets, linear_shapes
from prag_core.llm.model_facts import ModelFacts
from prag_core.llm.peft import export_peft, import_peft, peft_base
from prag_core.llm.threads import compute_here
from prag_core.recipe import RECIPES, Recipe, TrainRecipe
from prag_core.records import Answer, Augmentation, Hit, Mode, Passage, QAPair, Reject
from prag_core.store.writers import packaged_writer
from prag_core.training.examples import TrainingJob, training_examples
from prag_core.training.trainer import Trainer

# One passage is trained at a time, so its examples decide the size of a step.
_TOKENS_PER_STEP = 1


@dataclass(frozen=True)
class LearnedPassage:
    """A passage with the pairs that it was learned from (None if its adapter was loaded), and its trained adapter."""

    passage: Passage
    augmentation: Augmentation | None
    adapter: TrainedAdapter
    recipe: Recipe


class PassageModel:
    """A frozen base model, and an adapter for each passage that it has learned.

    Args:
        name: A folder, a name on the hub, or the packaged model.
        dtype: `auto` is bfloat16 where the device multiplies it natively, else float32.
        device: `auto` is the GPU if there is one, else the CPU.
        recipe: How passages are learned: the name of a recipe, or a recipe of your own.
        generator: The model that writes question-answer pairs where `learn` gets none; by default the base model, with
            its writer if it has one.

    Raises:
        ConfigError: when there is no such recipe, or it starts from a stored adapter.
        ModelError: when the model cannot be loaded, or does not fit the recipe.
    """

    def __init__(
        self,
        name: str = ModelConfig.model_fields["name"].default,
        *,
        dtype: Literal["auto", "bfloat16", "float32"] = "auto",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        recipe: str | TrainRecipe = "recall",
        generator: Generator | None = None,
    ) -> None:
        if isinstance(recipe, str):
            if recipe not in RECIPES:
                raise ConfigError(f"recipe = {recipe!r}: no such recipe", f"recipes: {', '.join(sorted(RECIPES))}")
            recipe = RECIPES[recipe]
        if recipe.start:
            raise ConfigError("recipe.start names a stored adapter, but there is no store here", "use `prag run`")
        compute_here()
        self._base = load_base_model(ModelConfig(name=name, dtype=dtype, device=device))
        self._train = recipe
        self._layout, _ = find_targets(self._base.model, recipe)
        self._writer = packaged_writer(self._base.fingerprint) if generator is None else None
        self._generator = generator
        self._learned: dict[str, LearnedPassage] = {}
        processor = RequestProcessor(self._base, None, template=recipe.template)
        self._engine = Engine(self._base, recipe, processor, _Adapters(self._learned))

    @property
    def learned(self) -> Mapping[str, LearnedPassage]:
        """The passages that were learned or loaded, by key."""
        return MappingProxyType(self._learned)

    def learn(
        self, passage: Passage | str, pairs: Sequence[QAPair | tuple[str, str]] | None = None, *, title: str = ""
    ) -> Passage:
        """Train the passage's adapter, in place of an earlier one.

        Args:
            passage: A passage, or its text.
            pairs: Questions and answers about it, to which cloze questions are added as to imported ones, and nothing
                by a writer; by default the generator writes them.
            title: The title of a passage that is given as a text. A question alone should make clear what it is about,
                so a title helps where the text speaks of "he" or "the bridge".

        Returns:
            The passage, with which `ask` and `save` name it.

        Raises:
            InputError: when a text is blank, or no usable pair can be made.
            GenerationError: when the generator cannot be used.
            AdapterError: when training fails or learns nothing.
        """
        passage = _passage(passage, title)
        if pairs is not None:
            given = Augmentation(passage.key, (), _pairs(pairs), "imported", attempts=0)
            recipe = self._recipe(imported=True)
            augmentation = complete(passage, given, recipe.augment)
        else:
            recipe = self._recipe(imported=False)
            self._generator = self._generator or self._own_generator()
            (result,) = augment([passage], self._generator, recipe.augment)
            if isinstance(result, Reject):
                raise InputError(f"{_shown(passage)}: {result.reason}: {result.detail}", "give pairs of your own")
            augmentation = result
        examples = training_examples(self._base.tokenizer, passage, augmentation, self._train)
        if not examples:
            raise InputError(
                f"{_shown(passage)}: no example has at most {self._train.max_tokens} tokens", "shorten the passage"
            )
        trainer = Trainer(self._base, self._train)
        try:
            (adapter,) = trainer.train([TrainingJob(passage.key, examples)], tokens_per_step=_TOKENS_PER_STEP)
        finally:
            trainer.close()
        if adapter.factors is None:
            raise AdapterError(
                f"{_shown(passage)}: training failed: {adapter.failure}, last loss {adapter.last_loss:.3f}",
                "try another recipe, or another learning rate",
            )
        self._learned[passage.key] = LearnedPassage(passage, augmentation, adapter, recipe)
        return passage

    def ask(
        self,
        question: str,
        passages: Passage | str | Sequence[Passage | str] | None = None,
        mode: Mode = "combine",
        **settings: Any,
    ) -> Answer:
        """Answer a question, and say how each passage was used.

        Args:
            question: The question.
            passages: The passages to use, learned ones or others; by default the one that was learned. In `prag` and
                `combine`, one that was not learned goes into the prompt.
            mode: Where the passages go: `closed` (nowhere), `rag` (prompt), `prag` (weights), `combine` (both).
            settings: Other fields of `prag_core.inference.request.Request`, such as `strength` or `max_new_tokens`.

        Raises:
            InputError: when no passage is named, and not exactly one was learned.
            PromptTooLongError: when question and passages exceed the model's context.
        """
        chosen: list[Passage | str]
        if mode == "closed":
            chosen = []
        elif passages is None:
            chosen = [self._only_one()]
        else:
            chosen = [passages] if isinstance(passages, Passage | str) else list(passages)
        hits = tuple(Hit(_passage(passage), 1.0) for passage in chosen)
        return self._engine.answer(Request(question, mode, hits=hits, **settings))

    def save(self, folder: Path | str, passage: Passage | str | None = None) -> None:
        """Write a passage's adapter, by default that of the only one, as a PEFT folder with a card (README.md).

        Raises:
            InputError: when the passage was not learned, or the folder cannot be written.
        """
        key = (self._only_one() if passage is None else _passage(passage)).key
        if key not in self._learned:
            raise InputError(f"passage {key}: was not learned", "call `learn` first")
        learned = self._learned[key]
        adapter = learned.adapter
        assert adapter.factors is not None  # `learn` and `load` keep no other
        folder, base = Path(folder), peft_base(self._base.name, self._facts())
        export_peft(self._layout, adapter.factors, folder, base)
        card = AdapterCard(
            learned.recipe,
            key,
            learned.passage.title,
            learned.passage.sources,
            adapter.steps,
            adapter.tokens,
            adapter.first_loss,
            adapter.last_loss,
            adapter.seconds,
        )
        write_card(folder, base, card)

    def load(self, folder: Path | str, passage: Passage | str, *, title: str = "") -> Passage:
        """Use the adapter of a PEFT folder for a passage, and return the passage. The folder does not hold its text.

        Raises:
            AdapterError: when the folder holds no plain LoRA adapter of this recipe's shape and this base model.
        """
        passage = _passage(passage, title)
        factors = import_peft(self._layout, Path(folder), peft_base(self._base.name, self._facts()))
        adapter = TrainedAdapter(passage.key, factors, 0, 0, 0.0, 0.0, 0.0)
        self._learned[passage.key] = LearnedPassage(passage, None, adapter, self._recipe(imported=True))
        return passage

    def _recipe(self, *, imported: bool) -> Recipe:
        """Return the recipe that the pipeline would have with its defaults."""
        generator = self._base.fingerprint if self._generator is None else self._generator.fingerprint
        augmenting = augment_recipe(AugmentConfig(), generator, self._train)
        if self._writer is not None:
            augmenting = self._writer.augment_recipe(augmenting)
        return Recipe(self._base.fingerprint, replace(augmenting, imported=imported), self._train)

    def _own_generator(self) -> Generator:
        return TransformersGenerator(self._base, adapter=self._writer.adapter() if self._writer else None)

    def _facts(self) -> ModelFacts:
        return ModelFacts(self._base.fingerprint, linear_shapes(self._base.model))

    def _only_one(self) -> Passage:
        if len(self._learned) != 1:
            known = ", ".join(_shown(learned.passage) for learned in self._learned.values())
            raise InputError(
                f"{len(self._learned)} passages were learned: {known or 'none'}",
                "name the passages; a store's index finds them by itself (`prag run`)",
            )
        return next(iter(self._learned.values())).passage


class _Adapters:
    """The adapters of learned passages, as the engine asks for them."""

    def __init__(self, learned: Mapping[str, LearnedPassage]) -> None:
        self._learned = learned

    def get(self, key: str) -> Mapping[str, Tensor]:
        learned = self._learned.get(key)
        if learned is None or learned.adapter.factors is None:
            raise AdapterError(f"passage {key}: was not learned", "call `learn` first")
        return learned.adapter.factors


def _passage(passage: Passage | str, title: str = "") -> Passage:
    if isinstance(passage, Passage):
        return passage
    text = passage.strip()
    if not text:
        raise InputError("the passage is blank", "give a text")
    return Passage(passage_key(title, text), title, text, ())


def _pairs(pairs: Sequence[QAPair | tuple[str, str]]) -> tuple[QAPair, ...]:
    made = []
    for number, pair in enumerate(pairs, start=1):
        # A full answer is read where the template lets the model reason; the short one is all that is known here.
        made.append(pair if isinstance(pair, QAPair) else QAPair(pair[0], pair[1], pair[1]))
        if not made[-1].question.strip() or not made[-1].answer.strip():
            raise InputError(f"pair {number}: the question or the answer is blank", "give both")
    if not made:
        raise InputError("the list of pairs is empty", "give at least one, or None to let the model write them")
    return tuple(made)


def _shown(passage: Passage) -> str:
    return f"passage {passage.title!r}" if passage.title else f"passage {passage.text[:40]!r}"
