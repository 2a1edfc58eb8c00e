"""Augment stage: passages without an augmentation → augmentations, stored batch by batch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pyarrow as pa
import ray.data

from pipelines.execution.child_process import Heartbeat
from pipelines.execution.isolation import StageRun, run_actors
from pipelines.execution.outcomes import Budget, Outcome, StageReport, Tally, outcome_table
from pipelines.execution.progress import RunProgress, follow_outcomes
from pipelines.execution.recovery import resume_until_done, retry_on_loss
from pipelines.execution.survey import Survey, with_passages
from pipelines.execution.tables import map_blocks
from pipelines.settings import RunContext, writer_of
from prag_core.augmentation.augment import augment, complete
from prag_core.augmentation.formats import ImportedAugmentations, names_of, read_augmentations
from prag_core.config import Config
from prag_core.llm.base_model import load_base_model
from prag_core.llm.generator import Generator, TransformersGenerator
from prag_core.llm.openai_generator import OpenAIGenerator
from prag_core.llm.threads import compute_here
from prag_core.records import Augmentation, Passage, Reject, from_table
from prag_core.store.tables import put_augmentations, put_rejects


def make_generator(config: Config) -> Generator:
    """Open the generator that a configuration names, with its writer's adapter if the strategy needs one.

    Raises:
        ConfigError: when the store has no such writer, or its factors are altered.
    """
    if config.augment.generator == "openai":
        return OpenAIGenerator(config.augment.endpoint)
    name = config.augment.model or config.model.name
    base = load_base_model(config.model.model_copy(update={"name": name}))
    writer = writer_of(config, base.fingerprint)
    if writer is None:
        return TransformersGenerator(base)
    return TransformersGenerator(base, adapter=writer.adapter())


class AugmentPassages:
    """The actor of this stage: it holds the generator, and stores its augmentations before it reports them."""

    def __init__(self, context: RunContext) -> None:
        config = context.config
        self._config = config
        self._store = context.store
        self._recipe = context.recipe.augment
        self._run = context.run
        self._threads = context.profile.augment.threads
        file = config.augment.import_file
        self._imported = read_augmentations(file, config.storage) if file else None
        self._generator: Generator | None = None

    def __call__(self, table: pa.Table, heartbeat: Heartbeat) -> pa.Table:
        """Augment a batch of passages and return one outcome each; `heartbeat` is not called in between."""
        passages = from_table(Passage, table)
        results: list[Augmentation | Reject] = []
        missing = []
        for passage in passages:
            found = self._imported.find(passage) if self._imported else None
            if found is not None:
                results.append(complete(passage, found, self._recipe))
            else:
                missing.append(passage)
        results += self._generate(missing)
        made = [result for result in results if isinstance(result, Augmentation)]
        rejects = [replace(result, recipe=self._recipe.fingerprint) for result in results if isinstance(result, Reject)]
        if made:
            put_augmentations(self._store, self._recipe.fingerprint, made)
        put_rejects(self._store, self._run, rejects)
        return outcome_table(
            [
                *(
                    Outcome(r.key, pairs=len(r.pairs), refused=r.refused, coverage=r.coverage, seconds=r.seconds)
                    for r in made
                ),
                *(Outcome(reject.key, rejected=reject.reason) for reject in rejects),
            ]
        )

    def _generate(self, passages: list[Passage]) -> list[Augmentation | Reject]:
        if not passages:
            return []
        if self._config.augment.generator == "none":
            detail = f"not in {self._config.augment.import_file}, and augment.generator is none"
            return [Reject("augment", "not_imported", detail, p.sources[0], p.key) for p in passages]
        if self._generator is None:  # no model is needed if all augmentations are imported
            compute_here(self._threads)
            self._generator = make_generator(self._config)
        return augment(passages, self._generator, self._recipe)


def run_augment(
    context: RunContext,
    passages: ray.data.Dataset,
    first: Survey,
    take_survey: Callable[[], Survey],
    budget: Budget,
    progress: RunProgress,
) -> StageReport:
    """Augment the passages that a survey found missing. In = done (now and earlier) + rejected (now and earlier).

    `take_survey` is called again if a part of the cluster is lost. `budget` limits the rejects; those that a survey
    found are counted too.
    """
    begun, config = time.perf_counter(), context.config
    # Read here too: a bad file stops the run before any actor starts, and its bad lines are counted once.
    file = config.augment.import_file
    imported = read_augmentations(file, config.storage) if file else ImportedAugmentations({}, (), {})
    put_rejects(context.store, context.run, imported.rejects)
    unmatched = retry_on_loss("augment", lambda: _unmatched(imported, passages), progress) if file else []
    if unmatched:
        example = min(unmatched, key=lambda name: (len(imported.places[name]), imported.places[name]))
        progress.console.print(
            f"augment: {len(unmatched)} of {len(imported.by_name)} imported augmentations are for no passage of the "
            f"corpus, such as {example!r} at {imported.places[example]}"
        )
    batch = config.run.augment_batch
    # The actor returns a batch at once, so its time limit is that of all passages together.
    silence_s = config.run.passage_timeout_s * batch
    recipe = context.recipe.augment.fingerprint
    stage_run = StageRun(context.store, context.run, "augment", recipe, config.run, silence_s)

    def work(survey: Survey) -> Tally:
        total = survey.counts["to_augment"]
        if not total:
            return Tally()
        missing = with_passages(survey, "to_augment", passages, context.profile)
        outcomes = run_actors(AugmentPassages, (context,), missing, batch, context.profile.augment, stage_run)
        return follow_outcomes(outcomes, total, "augment", progress, budget.after(survey.rejected))

    last, tally = resume_until_done("augment", "to_augment", first, take_survey, work, progress)
    return StageReport(
        stage="augment",
        taken=first.passages,
        done=last.augmented + tally.done,
        earlier=first.augmented,
        rejected=dict(last.reasons["augment_rejected"] + tally.rejected),
        seconds=time.perf_counter() - begun,
        extra={
            "pairs": {str(pairs): n for pairs, n in sorted(tally.pairs.items())},
            "coverage": round(tally.coverage / tally.done, 3) if tally.done else None,
            "refused": dict(tally.refused),
            "import_rejected": dict(Counter(reject.reason for reject in imported.rejects)),
            "import_not_in_corpus": len(unmatched),
        },
    )


def _unmatched(imported: ImportedAugmentations, passages: ray.data.Dataset) -> list[str]:
    """Return the names in an import file that no passage of the corpus has."""
    matched = map_blocks(passages, _names_in, names=frozenset(imported.by_name))
    return sorted({*imported.by_name} - {row["name"] for row in matched.iter_rows()})


def _names_in(table: pa.Table, names: frozenset[str]) -> pa.Table:
    found = {name for passage in from_table(Passage, table) for name in names_of(passage) if name in names}
    return pa.table({"name": pa.array(sorted(found), pa.string())})
