"""Index stage: the stored corpus → a Lucene index, archived in the store."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Any

import ray

from pipelines.execution.outcomes import StageReport
from prag_core.config import IndexConfig
from prag_core.retrieval.archive import find_index
from prag_core.retrieval.build import make_index
from prag_core.retrieval.jvm import JVM_ENV
from prag_core.retrieval.lucene import index_id
from prag_core.store.objects import Store

log = logging.getLogger(__name__)


def run_index(
    store: Store, corpus_version: str, former: str | None, config: IndexConfig, passages: int, cpus: float
) -> tuple[str, StageReport]:
    """Make the index of a corpus version unless the store has it, in a process of so many CPUs.

    It is made from that of the corpus version `former` if that pays (`prag_core.retrieval.build`). Returns its id and the
    report, which says how it was made.
    """
    begun = time.perf_counter()
    id = index_id(corpus_version, config)
    found = find_index(store, id)
    earlier = found is not None
    extra: dict[str, Any] = {}
    if found is None:
        # The JVM lives in a worker process of its own: never in the driver, never in one that Ray reuses.
        make = ray.remote(make_index).options(num_cpus=cpus, max_retries=3, runtime_env={"env_vars": JVM_ENV})
        found, making = ray.get(make.remote(store, corpus_version, former, config))
        extra = asdict(making)
        log.log(logging.WARNING if making.failed else logging.INFO, "index %s: %s", id, making)
    report = StageReport(
        stage="index",
        taken=passages,
        done=found.documents,
        earlier=found.documents if earlier else 0,
        rejected={},
        seconds=time.perf_counter() - begun,
        bytes=found.size_bytes,
        extra=extra,
    )
    return id, report
