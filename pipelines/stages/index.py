"""Index stage: the stored corpus → a search index, archived in the store."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Any

import ray

from pipelines.execution.outcomes import StageReport
from pipelines.settings import RunContext
from prag_core.retrieval.archive import find_index
from prag_core.retrieval.build import make_index
from prag_core.retrieval.kinds import index_id, index_kind

log = logging.getLogger(__name__)


def run_index(context: RunContext, corpus_version: str, former: str | None, passages: int) -> tuple[str, StageReport]:
    """Build the index of a corpus version, unless the store has it; return its id and the report.

    If it pays, the index is updated from that of the corpus version `former` (`prag_core.retrieval.build`). The
    report says how it was built.
    """
    begun = time.perf_counter()
    store, config = context.store, context.config.index
    id = index_id(corpus_version, config)
    found = find_index(store, id)
    earlier = found is not None
    extra: dict[str, Any] = {}
    if found is None:
        # Its environment gives it a worker process of its own: never the driver, never one with other tasks.
        environment = {"env_vars": index_kind(config).PROCESS_ENV}
        make = ray.remote(make_index).options(
            num_cpus=context.profile.index_cpus, max_retries=3, runtime_env=environment
        )
        found, built = ray.get(make.remote(store, corpus_version, former, config))
        extra = asdict(built)
        log.log(logging.WARNING if built.failed else logging.INFO, "index %s: %s", id, built)
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
