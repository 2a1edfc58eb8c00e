"""Import augmentations from a file into the store, and export them: our format, or the JSON of the paper's authors."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from cluster.session import ray_session
from pipelines.execution.lookup import find_augmentations, iter_records
from pipelines.execution.outcomes import Budget
from pipelines.execution.progress import RunProgress
from pipelines.execution.survey import Survey, survey
from pipelines.settings import make_context, profile_of
from pipelines.stages.augment import run_augment
from pipelines.stages.ingest import ingest, store_corpus, stored_passages
from prag_core.augmentation.formats import write_augmentations
from prag_core.config import Config
from prag_core.records import Passage
from prag_core.store.adapters import open_adapters
from prag_core.store.objects import open_store
from prag_core.store.runs import hold_lease, new_run_id
from prag_core.store.snapshot import forgotten_now, load_snapshot


def import_into_store(config: Config, console: Console) -> dict[str, int]:
    """Store the augmentations that `augment.import_file` holds for passages of the corpus, completed as in a run.

    Passages that the file lacks are left to the next run. Forgotten ones are left out.

    Returns:
        Counts: the passages, those imported now and earlier, those that are left to the next run, and those that were
        rejected while their imports were completed; then the file's records for no passage of the corpus, and its bad
        ones.

    Raises:
        InputError: when the file or the corpus cannot be read.
        LeaseError: when a run works on the store.
    """
    context = make_context(config, new_run_id())
    store, profile, run = context.store, context.profile, context.run
    progress = RunProgress(store, run, console)
    with hold_lease(store, run), progress.running(), ray_session(profile):
        corpus = ingest(config.corpus, profile, forgotten_now(store), config.storage)
        store_corpus(store, corpus, run)
        passages = stored_passages(store, corpus.version, profile.partitions)

        def take_survey() -> Survey:
            return survey(store, passages, corpus.count, context.recipe, profile)

        budget = Budget(corpus.count, 1.0)
        report = run_augment(context, passages, take_survey(), take_survey, budget, progress, only_imports=True)
    return {
        "passages": report.taken,
        "imported": report.done - report.earlier,
        "there_before": report.earlier,
        "left_to_next_run": report.rejected.get("not_imported", 0),
        "rejected": sum(n for reason, n in report.rejected.items() if reason != "not_imported"),
        "not_in_corpus": report.extra["import_not_in_corpus"],
        "bad_records": sum(report.extra["import_rejected"].values()),
    }


def export_from_store(config: Config, file: Path, form: str, snapshot_id: str | None, console: Console) -> int:
    """Write the augmentations of a snapshot's passages in the order of the passages' ids, and return their number.

    With the form `jsonl` each line has `id`, `key`, `rewrites` and `qa`. With the form `paper` each passage is a record
    of its own, without a question, with the first rewrite only.
    """
    store, profile = open_store(config), profile_of(config)
    snapshot = load_snapshot(store, snapshot_id)
    adapters, _ = open_adapters(store, snapshot.recipe)
    with ray_session(profile):
        passages = list(iter_records(Passage, stored_passages(store, snapshot.corpus_version, profile.partitions)))
        keys = {passage.key for passage in passages} - set(snapshot.tombstones)
        recipe = adapters.recipe.augment.fingerprint
        augmentations = find_augmentations(store, recipe, keys, profile.partitions)
    console.print(f"{len(augmentations)} of {len(keys)} passages have an augmentation")
    chosen = sorted((p for p in passages if p.key in augmentations), key=lambda p: (p.sources, p.key))
    write_augmentations(chosen, augmentations, file, form)
    return len(chosen)
