"""Augment stage: passages without an augmentation → augmentations, each stored as it is made."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pyarrow as pa
import ray.data

from cluster.resources import Profile
from pipelines.execution.child_process import Alive
from pipelines.execution.isolation import StageRun, run_actors
from pipelines.execution.outcomes import Budget, Outcome, StageReport, Tally, outcome_table
from pipelines.execution.progress import RunProgress, follow_outcomes
from pipelines.execution.recovery import resume_until_done
from pipelines.execution.survey import Survey, with_passages
from prag_core.augmentation.augment import augment
from prag_core.augmentation.formats import read_augmentations
from prag_core.config import Config
from prag_core.llm.base_model import load_base_model
from prag_core.llm.generator import Generator, TransformersGenerator
from prag_core.llm.openai_generator import OpenAIGenerator
from prag_core.llm.threads import compute_here
from prag_core.recipe import AugmentRecipe
from prag_core.records import Augmentation, Passage, Reject, from_table
from prag_core.store.objects import Store
from prag_core.store.tables import put_augmentations, put_rejects


def make_generator(config: Config) -> Generator:
    """Open the generator that a configuration names."""
    if config.augment.generator == "openai":
        return OpenAIGenerator(config.augment.endpoint)
    name = config.augment.model or config.model.name
    return TransformersGenerator(load_base_model(config.model.model_copy(update={"name": name})))


class AugmentPassages:
    """The actor of this stage: holds the generator, and stores what it makes before it reports it."""

    def __init__(self, config: Config, store: Store, recipe: AugmentRecipe, run: str, threads: int | None) -> None:
        self._config = config
        self._store = store
        self._recipe = recipe
        self._run = run
        self._threads = threads
        self._imported = read_augmentations(config.augment.import_file) if config.augment.import_file else None
        self._generator: Generator | None = None

    def __call__(self, table: pa.Table, alive: Alive) -> pa.Table:
        """Augment a batch of passages; give back one outcome each, all at the end: none of it is `alive` before."""
        passages = from_table(Passage, table)
        results: list[Augmentation | Reject] = []
        lacking = []
        for passage in passages:
            found = self._imported.find(passage) if self._imported else None
            if found is not None:
                results.append(found)
            else:
                lacking.append(passage)
        results += self._generate(lacking)
        made = [result for result in results if isinstance(result, Augmentation)]
        rejects = [replace(result, recipe=self._recipe.fingerprint) for result in results if isinstance(result, Reject)]
        if made:
            put_augmentations(self._store, self._recipe.fingerprint, made)
        put_rejects(self._store, self._run, rejects)
        return outcome_table(
            [
                *(Outcome(r.key, pairs=len(r.pairs), refused=r.refused, seconds=r.seconds) for r in made),
                *(Outcome(reject.key, rejected=reject.reason) for reject in rejects),
            ]
        )

    def _generate(self, passages: list[Passage]) -> list[Augmentation | Reject]:
        if not passages:
            return []
        if self._config.augment.generator == "none":
            detail = f"not in {self._config.augment.import_file}, and augment.generator is none"
            return [Reject("augment", "not_imported", detail, p.sources[0], p.key) for p in passages]
        if self._generator is None:  # a corpus whose augmentations are all imported needs no model
            compute_here(self._threads)
            self._generator = make_generator(self._config)
        return augment(passages, self._generator, self._recipe)


def run_augment(
    config: Config,
    store: Store,
    profile: Profile,
    recipe: AugmentRecipe,
    passages: ray.data.Dataset,
    before: Survey,
    look: Callable[[], Survey],
    budget: Budget,
    progress: RunProgress,
) -> StageReport:
    """Augment what a survey found missing. In = done (now and earlier) + rejected (now and earlier).

    `look` makes a new survey, should a part of the cluster be lost meanwhile; `budget` is what the run may reject,
    besides what a survey found rejected.
    """
    begun, run = time.perf_counter(), progress.run
    # Read here too: a bad file stops the run before any actor starts, and its bad lines are counted once.
    imported = read_augmentations(config.augment.import_file).rejects if config.augment.import_file else ()
    put_rejects(store, run, imported)

    def work(survey: Survey) -> Tally:
        total = survey.counts["to_augment"]
        if not total:
            return Tally()
        missing = with_passages(survey, "to_augment", passages, profile)
        arguments = (config, store, recipe, run, profile.augment.threads)
        desk = StageRun(store, run, "augment", recipe.fingerprint)
        silence_s = config.run.passage_timeout_s * config.run.augment_batch
        outcomes = run_actors(
            AugmentPassages,
            arguments,
            missing,
            config.run.augment_batch,
            profile.augment,
            desk,
            config.run,
            silence_s=silence_s,
        )
        return follow_outcomes(outcomes, total, "augment", progress, budget.less(survey.rejected))

    last, tally = resume_until_done("augment", "to_augment", before, look, work, progress)
    return StageReport(
        stage="augment",
        taken=before.passages,
        done=last.augmented + tally.done,
        earlier=before.augmented,
        rejected=dict(last.reasons["augment_rejected"] + tally.rejected),
        seconds=time.perf_counter() - begun,
        extra={
            "pairs": {str(pairs): n for pairs, n in sorted(tally.pairs.items())},
            "refused": dict(tally.refused),
            "import_rejected": dict(Counter(reject.reason for reject in imported)),
        },
    )
