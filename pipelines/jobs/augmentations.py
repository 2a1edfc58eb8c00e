"""Augmentations between the store and files: ours, and the JSON that the paper's authors publish."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from cluster.session import ray_session
from pipelines.execution.lookup import batches, find_augmentations
from pipelines.execution.outcomes import Budget
from pipelines.execution.progress import RunProgress
from pipelines.execution.survey import Survey, survey
from pipelines.execution.tables import read_columns
from pipelines.settings import describe, profile_of
from pipelines.stages import augment, ingest
from prag_core.augmentation.formats import write_augmentations
from prag_core.config import Config
from prag_core.records import Passage, from_table, schema
from prag_core.store.adapters import open_adapters
from prag_core.store.objects import open_store
from prag_core.store.runs import hold_lease, new_run_id
from prag_core.store.snapshot import forgotten_now, load_snapshot
from prag_core.store.tables import corpus_parts


def import_into_store(config: Config, console: Console) -> dict[str, int]:
    """Store what `augment.import_file` holds for the passages of the corpus; nothing is generated.

    Forgotten passages are left out.

    Returns:
        Counts: the passages, those imported now and earlier, those that the file lacks, and the file's bad records.

    Raises:
        InputError: when the file or the corpus cannot be read.
        LeaseError: when a run works on the store.
    """
    store = open_store(config)
    recipe, _ = describe(config)
    # What the file lacks is no failure here: the next run augments it.
    augmenting = config.augment.model_copy(update={"generator": "none"})
    only = config.model_copy(update={"augment": augmenting})
    run = new_run_id()
    profile, progress = profile_of(config), RunProgress(store, run, console)
    with hold_lease(store, run), progress.until_the_end(), ray_session(profile):
        corpus = ingest.ingest(config.corpus, profile, forgotten_now(store))
        ingest.store_corpus(store, corpus, run)
        passages = ingest.stored_passages(store, corpus.version, profile.partitions)

        def look() -> Survey:
            return survey(store, passages, corpus.count, recipe, profile)

        budget = Budget(corpus.count, 1.0)
        report = augment.run_augment(only, store, profile, recipe.augment, passages, look(), look, budget, progress)
    return {
        "passages": report.taken,
        "imported": report.done - report.earlier,
        "there_before": report.earlier,
        "not_in_file": report.rejected.get("not_imported", 0),
        "bad_records": sum(report.extra["import_rejected"].values()),
    }


def export_from_store(config: Config, file: Path, form: str, snapshot_id: str | None, console: Console) -> int:
    """Write the augmentations of a snapshot's passages, in the order of their ids; return how many.

    In the form `jsonl` each line has `id`, `key`, `rewrites` and `qa`; in the form `paper` each passage is a record
    of its own, without a question, and of several rewrites the first.
    """
    store = open_store(config)
    snapshot = load_snapshot(store, snapshot_id)
    adapters, _ = open_adapters(store, snapshot.recipe)
    partitions = profile_of(config).partitions
    with ray_session(profile_of(config)):
        parts = corpus_parts(store, snapshot.corpus_version)
        rows = read_columns(store, parts, schema(Passage).names, partitions)
        passages = [p for batch in batches(rows) for p in from_table(Passage, batch)]
        keys = {passage.key for passage in passages} - set(snapshot.tombstones)
        augmentations = find_augmentations(store, adapters.recipe.augment.fingerprint, keys, partitions)
    console.print(f"{len(augmentations)} of {len(keys)} passages have an augmentation")
    chosen = sorted((p for p in passages if p.key in augmentations), key=lambda p: (p.sources, p.key))
    write_augmentations(chosen, augmentations, file, form)
    return len(chosen)
