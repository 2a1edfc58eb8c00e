"""The nightly job: what changed in a corpus is made, the candidate is looked at and asked, then it is published."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.execution.progress import RunProgress
from pipelines.execution.tables import distinct, read_columns
from pipelines.jobs.canary import Canary, ask_canaries, read_canaries
from pipelines.jobs.corpus_diff import CorpusDiff, compare_corpora
from pipelines.jobs.run import run_job
from pipelines.settings import profile_of
from prag_core.config import Config
from prag_core.errors import CanaryError, ConfigError, StoreError
from prag_core.retrieval.archive import find_index
from prag_core.store.objects import Store, open_store
from prag_core.store.runs import new_run_id
from prag_core.store.snapshot import Snapshot, put_candidate
from prag_core.store.tables import corpus_parts


@dataclass(frozen=True)
class ReindexReport:
    """What a nightly run found and did; `before` and `snapshot` are what served before and after it.

    `trained` adapters are new; `canary_f1`, and the `canary_min` that it had to reach, are None where no questions
    were asked, because none were given or nothing had changed.
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
    canary: Path | None = None,
    canary_min: float | None = None,
    take_over: bool = False,
    wait_s: float = 0.0,
) -> ReindexReport:
    """Bring the store to the configured corpus: make what is new, and the index, check, ask, publish once.

    What did not change is not touched, and when nothing did, nothing is published. What was removed from the corpus
    is not in the new index, so it is found no more from the publication on. The report is stored as
    `runs/<run>/reindex.json`; when the night fails, in whatever way, one that says how.

    Args:
        config: What to bring the store to.
        console: Is told what is going on.
        canary: A file of questions and answers, asked of the candidate before it is published.
        canary_min: The mean F1 that it must reach then; by default what the snapshot in service reaches.
        take_over: Take the store's lease from a run that is known to be dead.
        wait_s: How long to wait for the lease.

    Raises:
        ConfigError: when there is a `canary_min` without a `canary`.
        InputError: when the file of canary questions cannot be used.
        StoreError: when the candidate names something that the store lacks.
        CanaryError: when the candidate answers too badly; it is stored, and what served goes on.
        PragError: see `run_job`.
    """
    begun = time.perf_counter()
    if canary_min is not None and canary is None:
        raise ConfigError("--canary-min has no questions to ask", "name a file of them with --canary")
    canaries = read_canaries(canary) if canary else []
    store, run = open_store(config), new_run_id()
    look = _Look(config, store, canaries, canary_min)
    name = f"runs/{run}/reindex.json"
    try:
        report = run_job(config, console, take_over=take_over, wait_s=wait_s, gate=look, run=run)
    except BaseException as error:
        failed = {"run": run, "published": False, "error": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(StoreError):  # perhaps the very thing that failed
            store.put_json(name, {**failed, **look.found(), "seconds": round(time.perf_counter() - begun, 2)})
        raise
    new = {stage.stage: stage.done - stage.earlier for stage in report.stages}
    passages = next(stage.extra["passages"] for stage in report.stages if stage.stage == "corpus")
    result = ReindexReport(
        run=report.run,
        before=report.before,
        snapshot=report.snapshot,
        difference=look.difference or CorpusDiff(passages_kept=passages),
        augmented=new["augment"],
        trained=new["train"],
        rejected=report.rejected,
        canary_f1=look.canary_f1,
        canary_min=look.canary_min,
        seconds=time.perf_counter() - begun,
    )
    store.put_json(name, result.to_json())
    return result


class _Look:
    """The gate before publication: what changed, whether the candidate is whole, whether it answers."""

    def __init__(self, config: Config, store: Store, canaries: Sequence[Canary], canary_min: float | None) -> None:
        self._config = config
        self._store = store
        self._canaries = canaries
        self._asked_for = canary_min
        self.before: str | None = None
        self.candidate: str | None = None
        self.difference: CorpusDiff | None = None
        self.canary_f1: float | None = None
        self.canary_min: float | None = None

    def found(self) -> dict[str, Any]:
        """Return what is known by now, as plain values."""
        return {
            "before": self.before,
            "candidate": self.candidate,
            "difference": asdict(self.difference) if self.difference else None,
            "canary_f1": self.canary_f1,
            "canary_min": self.canary_min,
        }

    def __call__(self, old: Snapshot | None, new: Snapshot, progress: RunProgress) -> None:
        profile = profile_of(self._config)
        self.before = old.id if old else None
        version = old.corpus_version if old else None
        blocks = profile.blocks(new.passages)
        self.difference = compare_corpora(self._store, version, new.corpus_version, blocks)
        progress.console.print(f"difference: {self.difference}")
        check_whole(self._store, new, profile.partitions)
        if not self._canaries:
            return
        put_candidate(self._store, new)
        self.candidate = new.id
        ids = [new.id, *([old.id] if old and self._asked_for is None else [])]
        self.canary_f1, *served = ask_canaries(self._config, self._store, ids, self._canaries, profile.train)
        self.canary_min = self._asked_for if self._asked_for is not None else max(served, default=0.0)
        said = f"{len(self._canaries)} canary questions with F1 {self.canary_f1:.3f}"
        progress.console.print(f"the candidate {new.id} answers {said}; {self.canary_min:.3f} are asked for")
        if self.canary_f1 < self.canary_min:
            least = "--canary-min" if self._asked_for is not None else "what the snapshot in service reaches,"
            raise CanaryError(
                f"the candidate {new.id} answers {said}, below {least} {self.canary_min:.3f}: it was not published, "
                f"{self.before or 'nothing'} stays in service",
                f"ask it with `prag ask --snapshot {new.id}`; if it is good, publish it with a lower --canary-min",
            )


def check_whole(store: Store, snapshot: Snapshot, partitions: int) -> None:
    """Check that everything a snapshot names is in the store: corpus parts, index, ledger parts and their shards.

    Raises:
        StoreError: naming the first thing that is not.
    """
    missing = [] if find_index(store, snapshot.index) else [f"indexes/{snapshot.index}"]
    parts = corpus_parts(store, snapshot.corpus_version)
    missing += sorted({*parts} - {*store.list(f"corpus/{snapshot.corpus_version}", ".parquet")})
    if snapshot.ledger_parts and not missing:
        named = read_columns(store, list(snapshot.ledger_parts), ["shard"], partitions)
        shards = named.map_batches(distinct, batch_size=None, batch_format="pyarrow", fn_kwargs={"column": "shard"})
        there = {*store.list(f"adapters/{snapshot.recipe}/shards", ".safetensors")}
        missing += sorted({row["shard"] for row in shards.iter_rows()} - there)
    if missing:
        raise StoreError(
            f"{store.url}/{missing[0]}: the candidate snapshot names it, and it is not there "
            f"({len(missing)} such); nothing was published",
            "check the store; what is missing is made again once nothing names it",
        )
