"""Augmentations between the store and files: ours, and the JSON that the paper's authors publish."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.session import ray_session
from pipelines import augment, ingest
from pipelines import evaluation_data as data
from pipelines.describe import describe
from pipelines.outcomes import Budget
from pipelines.profiles import profile_of
from pipelines.progress import RunProgress
from pipelines.tables import Survey, read_columns, survey
from prag_core.adapter_store import open_adapters
from prag_core.augment_import import paper_passages
from prag_core.config import Config
from prag_core.forgetting import corpus_parts
from prag_core.lease import hold_lease
from prag_core.prompts import passage_text
from prag_core.records import Augmentation, Passage, from_table, schema
from prag_core.snapshot import forgotten_now, load_snapshot
from prag_core.store import open_store

# The name of the augmenting model in the paper's form.
_MODEL = "prag"


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
    run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
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


def write_corpus(file: str, corpus: Path) -> int:
    """Write the passages of a file in the paper's form as a corpus in JSON Lines; return how many there are."""
    texts = paper_passages(file)
    lines = [json.dumps({"id": f"paper-{i}", "title": "", "text": text}) for i, text in enumerate(texts)]
    corpus.parent.mkdir(parents=True, exist_ok=True)
    corpus.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


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
        passages = [p for batch in data.batches(rows) for p in from_table(Passage, batch)]
        keys = {passage.key for passage in passages} - set(snapshot.tombstones)
        augmentations = data.find_augmentations(store, adapters.recipe.augment.fingerprint, keys, partitions)
    console.print(f"{len(augmentations)} of {len(keys)} passages have an augmentation")
    chosen = sorted((p for p in passages if p.key in augmentations), key=lambda p: (p.sources, p.key))
    write_augmentations(chosen, augmentations, file, form)
    return len(chosen)


def write_augmentations(
    passages: list[Passage], augmentations: Mapping[str, Augmentation], file: Path, form: str
) -> None:
    """Write the augmentations of these passages, by key, in the form `jsonl` or `paper`; see `export_from_store`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines((_paper if form == "paper" else _lines)(passages, augmentations))


def _lines(passages: list[Passage], augmentations: Mapping[str, Augmentation]) -> Iterator[str]:
    for passage in passages:
        found = augmentations[passage.key]
        pairs = [asdict(pair) for pair in found.pairs]
        line = {"id": passage.sources[0], "key": passage.key, "rewrites": list(found.rewrites), "qa": pairs}
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _paper(passages: list[Passage], augmentations: Mapping[str, Augmentation]) -> Iterator[str]:
    for number, passage in enumerate(passages):
        found = augmentations[passage.key]
        text = passage_text(passage)
        item: dict[str, Any] = {"pid": 0, "passage": text}
        if found.rewrites:
            item[f"{_MODEL}_rewrite"] = found.rewrites[0]
        item[f"{_MODEL}_qa"] = [asdict(pair) for pair in found.pairs]
        record = {"test_id": number, "passages": [text], "augment": [item]}
        yield ("[\n" if number == 0 else ",\n") + json.dumps(record, ensure_ascii=False)
    yield "\n]\n" if passages else "[]\n"
