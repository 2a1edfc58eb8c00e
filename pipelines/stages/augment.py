"""Augment stage: passages without an augmentation → augmentations, stored as they come."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from pipelines.settings import RunContext, augmenting_model, writer_of
from prag_core.augmentation.augment import augment_each, complete, lacks_pairs
from prag_core.augmentation.formats import ImportedAugmentations, names_of, read_augmentations
from prag_core.config import DEFAULT_CONCURRENCY, Config
from prag_core.llm.base_model import load_base_model
from prag_core.llm.generator import CPU_ROWS, MOST_ROWS, Generator, TransformersGenerator
from prag_core.llm.openai_generator import OpenAIGenerator
from prag_core.llm.threads import compute_here
from prag_core.llm.vllm_generator import DEFAULT_REQUESTS, VllmGenerator
from prag_core.records import Augmentation, Passage, Reject, from_table
from prag_core.store.tables import put_augmentations, put_rejects

# A task has at most so many passages for each request in flight. At its end the actor runs empty, and until then the
# driver does not see what it has done. A model on a CPU is slow, and loses little when it runs empty.
_ENDPOINT_SHARE, _GPU_SHARE, _CPU_SHARE = 16, 8, 4


def make_generator(config: Config, gpus: float, on_progress: Callable[[], None] = lambda: None) -> Generator:
    """Open the generator that a configuration names, with its writer's adapter if the strategy needs one.

    `gpus` are the GPUs that this process holds. `on_progress` is called whenever the generator has made progress.

    Raises:
        ConfigError: when the store has no such writer, or its factors are altered, or there is no vLLM.
        ModelError: when the model cannot be found or loaded.
    """
    if config.augment.generator == "openai":
        concurrency = config.augment.concurrency or DEFAULT_CONCURRENCY
        return OpenAIGenerator(config.augment.endpoint, concurrency=concurrency, on_progress=on_progress)
    model = config.model.model_copy(update={"name": augmenting_model(config)})
    if config.augment.generator == "vllm":
        requests = config.augment.concurrency or DEFAULT_REQUESTS
        return VllmGenerator(
            config.augment.vllm, model, concurrency=requests, send_seed=gpus > 0, on_progress=on_progress
        )
    base = load_base_model(model, gpus=gpus)
    writer = writer_of(config, base.fingerprint)
    rows = config.augment.concurrency
    if writer is not None:
        # Imported here: the driver imports this module too, and torch would cost it seconds.
        from prag_core.llm.lora import merge_adapter

        # All prompts need it, and nobody else uses this model.
        merge_adapter(base.model, *writer.adapter())
    return TransformersGenerator(base, max_batch=rows, on_progress=on_progress)


class AugmentPassages:
    """The actor of this stage: it holds the generator, and stores its augmentations before it reports them."""

    def __init__(self, context: RunContext, only_imports: bool = False) -> None:
        config = context.config
        self._only_imports = only_imports or config.augment.generator == "none"
        self._config = config
        self._store = context.store
        self._recipe = context.recipe.augment
        self._run = context.run
        self._actors = context.profile.augment
        file = config.augment.import_file
        self._imported = read_augmentations(file, config.storage) if file else None
        self._heartbeat: Heartbeat = lambda share: None
        self._share = 0.0
        # What the generator opens in this loop (connections) is kept from one task to the next.
        self._loop = asyncio.Runner()
        # Loading a model has no time limit here. It waits if imports are taken as they are: they may be all.
        imports_alone = bool(file) or self._only_imports
        self._generator = None if imports_alone and not self._recipe.complete_imports else self._make_generator()

    def prepare(self, table: pa.Table) -> list[Passage]:
        """Return the passages of a batch."""
        return from_table(Passage, table)

    def __call__(self, passages: list[Passage], heartbeat: Heartbeat) -> Iterator[pa.Table]:
        """Augment passages and yield one outcome each as they are stored; `heartbeat` is called in between."""
        self._heartbeat, self._share = heartbeat, 0.0
        made: list[Augmentation | Reject] = []
        missing, given = [], {}
        for passage in passages:
            found = self._imported.find(passage) if self._imported else None
            if found is not None and not lacks_pairs(found, self._recipe):
                made.append(complete(passage, found, self._recipe))
                continue
            missing.append(passage)
            if found is not None:
                given[passage.key] = found
        since, ended = time.monotonic(), len(made)
        for results in self._generate(missing, given):
            made += results
            ended += len(results)
            self._share = ended / len(passages)
            limits = self._config.run
            if len(made) >= limits.augment_batch or time.monotonic() - since >= limits.commit_every_s:
                yield self._put(made)
                made, since = [], time.monotonic()
        if made:
            yield self._put(made)

    def _put(self, results: Sequence[Augmentation | Reject]) -> pa.Table:
        """Store results, and return their outcomes."""
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

    def _generate(
        self, passages: list[Passage], given: Mapping[str, Augmentation]
    ) -> Iterator[list[Augmentation | Reject]]:
        if self._only_imports:
            settings = self._config.augment
            why = "augment.generator is none" if settings.generator == "none" else "the next run generates some"
            why = f"not in {settings.import_file}, and {why}"
            lacking = [passage for passage in passages if passage.key not in given]
            yield [Reject("augment", "not_imported", why, passage.sources[0], passage.key) for passage in lacking]
            passages = [passage for passage in passages if passage.key in given]
        if not passages:
            return
        if self._generator is None:
            self._generator = self._make_generator()
        results = augment_each(passages, self._generator, self._recipe, given)

        async def following() -> list[Augmentation | Reject] | None:
            return await anext(results, None)

        try:
            while ended := self._loop.run(following()):
                yield ended
        finally:
            self._loop.run(results.aclose())

    def _make_generator(self) -> Generator:
        if self._config.augment.generator == "transformers":
            compute_here(self._actors.threads)
        return make_generator(self._config, self._actors.gpus, lambda: self._heartbeat(self._share))


def augment_task_size(total: int, context: RunContext) -> int:
    """Return how many passages a task takes: enough to keep its actor busy, or fewer so that every actor has tasks."""
    config, pool = context.config, context.profile.augment
    if config.augment.generator == "openai":
        most = _ENDPOINT_SHARE * (config.augment.concurrency or DEFAULT_CONCURRENCY)
    elif config.augment.generator == "vllm":
        most = _ENDPOINT_SHARE * (config.augment.concurrency or DEFAULT_REQUESTS)
    elif pool.gpus:
        most = _GPU_SHARE * (config.augment.concurrency or MOST_ROWS)
    else:
        most = _CPU_SHARE * (config.augment.concurrency or CPU_ROWS)
    return max(config.run.augment_batch, most // 4, min(most, -(-total // pool.max_size)))


def run_augment(
    context: RunContext,
    passages: ray.data.Dataset,
    first: Survey,
    take_survey: Callable[[], Survey],
    budget: Budget,
    progress: RunProgress,
    *,
    only_imports: bool = False,
) -> StageReport:
    """Augment the passages that a survey found missing. In = done (now and earlier) + rejected (now and earlier).

    `take_survey` is called again if a part of the cluster is lost. `budget` limits the rejects; those that a survey
    found are counted too. With `only_imports`, a passage that the import file lacks is a reject (`not_imported`), as it
    is where the configuration has no generator.
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
    writes = bool(first.counts["to_augment"]) and config.augment.generator == "transformers" and not only_imports
    if writes and (name := augmenting_model(config)) != config.model.name:
        progress.console.print(f"augment: {name} writes pairs, not {config.model.name}")
    # An endpoint may take as long as its own limit says.
    silence_s = max(config.run.passage_timeout_s, 2 * config.augment.endpoint.timeout_s)
    recipe = context.recipe.augment.fingerprint
    stage_run = StageRun(context.store, context.run, "augment", recipe, config.run, silence_s)

    def work(survey: Survey) -> Tally:
        total = survey.counts["to_augment"]
        if not total:
            return Tally()
        missing = with_passages(survey, "to_augment", passages, context.profile)
        size = augment_task_size(total, context)
        shown = replace(stage_run, board=progress.board)
        arguments = (context, only_imports)
        outcomes = run_actors(AugmentPassages, arguments, missing, size, context.profile.augment, shown)
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
