"""Index stage: the stored corpus → an index, archived in the store."""

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
from prag_core.retrieval.kinds import index_id, index_kind
from prag_core.store.objects import Store

log = logging.getLogger(__name__)


def run_index(
    store: Store, corpus_version: str, former: str | None, config: IndexConfig, passages: int, cpus: float
) -> tuple[str, StageReport]:
    """Make the index of a corpus version, unless the store has it, in a process of its own with `cpus` CPUs.

    The index of the corpus version `former` is updated where that is faster (see `prag_core.retrieval.build`).
    Returns the id of the index and the report, which says how the index was made.
    """
    begun = time.perf_counter()
    id = index_id(corpus_version, config)
    found = find_index(store, id)
    earlier = found is not None
    extra: dict[str, Any] = {}
    if found is None:
        # Its environment gives it a worker process of its own: never the driver, never one with other tasks.
        environment = {"env_vars": index_kind(config).PROCESS_ENV}
        make = ray.remote(make_index).options(num_cpus=cpus, max_retries=3, runtime_env=environment)
        found, build = ray.get(make.remote(store, corpus_version, former, config))
        extra = asdict(build)
        log.log(logging.WARNING if build.failed else logging.INFO, "index %s: %s", id, build)
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
