"""The nightly job: train what is new in a corpus, check the candidate snapshot, ask it canary questions, publish it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.execution.progress import RunProgress
from pipelines.execution.tables import distinct, map_blocks, read_columns
from pipelines.jobs.canary import ask_canaries
from pipelines.jobs.corpus_diff import CorpusDiff, compare_corpora
from pipelines.jobs.run import run_job
from pipelines.settings import RunContext
from prag_core.config import Config
from prag_core.data.question_sets import JSONL, read_questions
from prag_core.data.questions import Question
from prag_core.errors import REPAIR, CanaryError, ConfigError, StoreError
from prag_core.retrieval.archive import find_index
from prag_core.store.objects import Store, open_store
from prag_core.store.runs import new_run_id
from prag_core.store.snapshot import Snapshot, put_candidate
from prag_core.store.tables import corpus_parts


@dataclass(frozen=True)
class ReindexReport:
    """What a nightly run did; `before` and `snapshot` are the snapshots in service before and after it.

    `trained` counts new adapters. `canary_f1`, and the `canary_min` that it had to reach, are None if no canary
    questions were asked, because none were given or nothing had changed.
    """

    run: str
    before: str | None
    snapshot: str
    difference: CorpusDiff
    augmented: int
    trained: int
    rejected: dict[str, int]
    canary_f1: float | None
    canary_min: float | None
    seconds: float

    @property
    def published(self) -> bool:
        """Whether another snapshot came into service."""
        return self.snapshot != self.before

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {**asdict(self), "published": self.published, "seconds": round(self.seconds, 2)}


def reindex(
    config: Config,
    console: Console,
    *,
    canary: Path | str | None = None,
    canary_min: float | None = None,
    take_over: bool = False,
    wait_s: float = 0.0,
) -> ReindexReport:
    """Run the main job on the configured corpus, and publish the candidate snapshot only if it passes its checks.

    What has not changed is not made again; if nothing has changed, nothing is published. A passage that was removed
    from the corpus is not in the new index, so it is not found once that is published. The report is stored as
    `runs/<run>/reindex.json`; if the run fails, that says why.

    Args:
        config: The configuration of the run.
        console: Shows the progress.
        canary: A file of questions and answers that the candidate must answer before it is published.
        canary_min: The mean F1 that the candidate must reach; by default that of the snapshot in service.
        take_over: Take the store's lease from a run that is known to be dead.
        wait_s: How long to wait for the lease.

    Raises:
        ConfigError: when there is a `canary_min` without a `canary`.
        InputError: when the file of canary questions cannot be used.
        StoreError: when the candidate names something that the store lacks.
        CanaryError: when the candidate answers too badly; it is stored, and the old snapshot stays in service.
        PragError: see `run_job`.
    """
    begun = time.perf_counter()
    if canary_min is not None and canary is None:
        raise ConfigError("--canary-min has no questions to ask", "name a file of them with --canary")
    gate = _CandidateGate(read_questions(str(canary), JSONL, config.storage) if canary else [], canary_min)
    store, run = open_store(config), new_run_id()
    name = f"runs/{run}/reindex.json"
    try:
        report = run_job(config, console, take_over=take_over, wait_s=wait_s, gate=gate, run=run)
    except BaseException as error:
        failed = {"run": run, "published": False, "error": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(StoreError):  # the store may be what failed
            store.put_json(name, {**failed, **gate.results(), "seconds": round(time.perf_counter() - begun, 2)})
        raise
    new = {stage.stage: stage.done - stage.earlier for stage in report.stages}
    passages = next(stage.extra["passages"] for stage in report.stages if stage.stage == "corpus")
    result = ReindexReport(
        run=report.run,
        before=report.before,
        snapshot=report.snapshot,
        difference=gate.difference or CorpusDiff(passages_kept=passages),
        augmented=new["augment"],
        trained=new["train"],
        rejected=report.rejected,
        canary_f1=gate.canary_f1,
        canary_min=gate.canary_min,
        seconds=time.perf_counter() - begun,
    )
    store.put_json(name, result.to_json())
    return result


class _CandidateGate:
    """The gate of a nightly run: compares the corpora, checks that the candidate is complete, asks the canaries."""

    def __init__(self, canaries: Sequence[Question], canary_min: float | None) -> None:
        self._canaries = canaries
        self._given_min = canary_min
        self.before: str | None = None
        self.candidate: str | None = None
        self.difference: CorpusDiff | None = None
        self.canary_f1: float | None = None
        self.canary_min: float | None = None

    def results(self) -> dict[str, Any]:
        """Return the results so far as plain values."""
        return {
            "before": self.before,
            "candidate": self.candidate,
            "difference": asdict(self.difference) if self.difference else None,
            "canary_f1": self.canary_f1,
            "canary_min": self.canary_min,
        }

    def __call__(self, context: RunContext, old: Snapshot | None, new: Snapshot, progress: RunProgress) -> None:
        store, profile = context.store, context.profile
        self.before = old.id if old else None
        version = old.corpus_version if old else None
        self.difference = compare_corpora(store, version, new.corpus_version, profile.blocks(new.passages))
        progress.console.print(f"difference: {self.difference}")
        check_complete(store, new, profile.partitions)
        if not self._canaries:
            return
        put_candidate(store, new)
        self.candidate = new.id
        ids = [new.id, *([old.id] if old and self._given_min is None else [])]
        self.canary_f1, *serving = ask_canaries(context.config, store, ids, self._canaries, profile.answer)
        self.canary_min = self._given_min if self._given_min is not None else max(serving, default=0.0)
        result = f"{len(self._canaries)} canary questions with F1 {self.canary_f1:.3f}"
        progress.console.print(f"the candidate {new.id} answers {result}; it must reach {self.canary_min:.3f}")
        if self.canary_f1 < self.canary_min:
            limit = "--canary-min" if self._given_min is not None else "what the snapshot in service reaches,"
            raise CanaryError(
                f"the candidate {new.id} answers {result}, below {limit} {self.canary_min:.3f}: it was not published, "
                f"{self.before or 'nothing'} stays in service",
                f"ask it with `prag ask --snapshot {new.id}`; if it is good, publish it with a lower --canary-min",
            )


def check_complete(store: Store, snapshot: Snapshot, partitions: int) -> None:
    """Check that everything a snapshot names is in the store: corpus parts, index, ledger parts and their shards.

    Raises:
        StoreError: naming the first object that is missing.
    """
    missing = [] if find_index(store, snapshot.index) else [f"indexes/{snapshot.index}"]
    parts = corpus_parts(store, snapshot.corpus_version)
    missing += sorted({*parts} - {*store.list(f"corpus/{snapshot.corpus_version}", ".parquet")})
    if snapshot.ledger_parts and not missing:
        named = read_columns(store, list(snapshot.ledger_parts), ["shard"], partitions)
        shards = {row["shard"] for row in map_blocks(named, distinct, column="shard").iter_rows()}
        missing += sorted(shards - {*store.list(f"adapters/{snapshot.recipe}/shards", ".safetensors")})
    if missing:
        raise StoreError(
            f"{store.url}/{missing[0]}: the candidate snapshot names it, but the store lacks it "
            f"({len(missing)} such objects); nothing was published",
            REPAIR,
        )
