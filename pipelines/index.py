"""Index stage: the stored corpus → a Lucene index, archived in the store."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pipelines.report import StageReport
from prag_core.config import IndexConfig
from prag_core.forgetting import corpus_parts
from prag_core.records import Passage, from_table
from prag_core.retrieval import JVM_ENV, StoredIndex, archive_index, build_index, find_index, index_id
from prag_core.store import Store


def run_index(
    store: Store, corpus_version: str, config: IndexConfig, passages: int, cpus: float
) -> tuple[str, StageReport]:
    """Build the index of a corpus version unless the store has it, in a process of so many CPUs.

    Returns its id and the report.
    """
    begun = time.perf_counter()
    id = index_id(corpus_version, config)
    found = find_index(store, id)
    earlier = found is not None
    if found is None:
        # The JVM lives in a worker process of its own: never in the driver, never in one that Ray reuses.
        build = ray.remote(_build).options(num_cpus=cpus, max_retries=3, runtime_env={"env_vars": JVM_ENV})
        found = ray.get(build.remote(store, corpus_version, id))
    report = StageReport(
        stage="index",
        taken=passages,
        done=found.documents,
        earlier=found.documents if earlier else 0,
        rejected={},
        seconds=time.perf_counter() - begun,
        bytes=found.size_bytes,
    )
    return id, report


def _build(store: Store, corpus_version: str, id: str) -> StoredIndex:
    with tempfile.TemporaryDirectory(prefix="prag-index-") as scratch:
        directory = Path(scratch) / "lucene"
        documents = build_index(_passages(store, corpus_version), directory)
        return archive_index(directory, store, id, corpus_version, documents)


def _passages(store: Store, corpus_version: str) -> Iterator[Passage]:
    for part in corpus_parts(store, corpus_version):
        with store.open(part) as stream:
            for batch in pq.ParquetFile(stream, page_checksum_verification=True).iter_batches():
                yield from from_table(Passage, pa.Table.from_batches([batch]))
