"""The nightly job: what changed in a corpus is made, the candidate is looked at and asked, then it is published."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.canary import Canary, ask_canaries, read_canaries
from pipelines.difference import Difference, compare
from pipelines.job import run_job
from pipelines.profiles import profile_of
from pipelines.progress import RunProgress
from pipelines.tables import distinct, read_columns
from prag_core.config import Config
from prag_core.errors import CanaryError, StoreError
from prag_core.forgetting import corpus_parts
from prag_core.retrieval import find_index
from prag_core.snapshot import Snapshot, current_id, load_snapshot, put_snapshot
from prag_core.store import Store, open_store


@dataclass(frozen=True)
class ReindexReport:
    """What a nightly run found and did; `before` and `snapshot` are what served before and after it.

    `trained` adapters are new; `canary_f1` is None where no questions were asked, because none were given or nothing
    had changed.
    """

    run: str
    before: str | None
    snapshot: str
    difference: Difference
    augmented: int
    trained: int
    rejected: dict[str, int]
    canary_f1: float | None
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
    canary_min: float = 0.0,
    take_over: bool = False,
    wait_s: float = 0.0,
) -> ReindexReport:
    """Bring the store to the configured corpus: make what is new, rebuild the index, check, ask, publish once.

    What did not change is not touched, and when nothing did, nothing is published. What was removed from the corpus
    is not in the new index, so it is found no more from the publication on. The report is stored as
    `runs/<run>/reindex.json`, also when the canary keeps the candidate from being published.

    Raises:
        InputError: when the file of canary questions cannot be used.
        StoreError: when the candidate names something that the store lacks.
        CanaryError: when the candidate answers worse than `canary_min`; it is stored, and what served goes on.
        PragError: see `run_job`.
    """
    begun = time.perf_counter()
    store = open_store(config)
    canaries = read_canaries(canary) if canary else []
    serving = current_id(store)
    before = load_snapshot(store, serving) if serving else None
    look = _Look(config, store, canaries, canary_min)
    report = run_job(config, console, take_over=take_over, wait_s=wait_s, gate=look)
    new = {stage.stage: stage.done - stage.earlier for stage in report.stages}
    result = ReindexReport(
        run=report.run,
        before=serving,
        snapshot=report.snapshot,
        difference=look.difference or Difference(passages_kept=before.passages if before else 0),
        augmented=new["augment"],
        trained=new["train"],
        rejected=report.rejected,
        canary_f1=look.canary_f1,
        seconds=time.perf_counter() - begun,
    )
    store.put_json(f"runs/{report.run}/reindex.json", result.to_json())
    return result


class _Look:
    """The gate before publication: what changed, whether the candidate is whole, whether it answers."""

    def __init__(self, config: Config, store: Store, canaries: Sequence[Canary], canary_min: float) -> None:
        self._config = config
        self._store = store
        self._canaries = canaries
        self._canary_min = canary_min
        self.difference: Difference | None = None
        self.canary_f1: float | None = None

    def __call__(self, old: Snapshot | None, new: Snapshot, progress: RunProgress) -> None:
        profile = profile_of(self._config)
        version = old.corpus_version if old else None
        self.difference = compare(self._store, version, new.corpus_version, profile.partitions)
        progress.console.print(f"difference: {self.difference}")
        check_whole(self._store, new, profile.partitions)
        if not self._canaries:
            return
        put_snapshot(self._store, new)
        self.canary_f1 = ask_canaries(self._config, self._store, new.id, self._canaries, profile.train)
        said = f"{len(self._canaries)} canary questions with F1 {self.canary_f1:.3f}"
        progress.console.print(f"the candidate {new.id} answers {said}")
        if self.canary_f1 < self._canary_min:
            serving = old.id if old else None
            report = {"before": serving, "candidate": new.id, "canary_f1": self.canary_f1, "published": False}
            whole = {**report, "run": progress.run, "difference": asdict(self.difference)}
            self._store.put_json(f"runs/{progress.run}/reindex.json", whole)
            raise CanaryError(
                f"the candidate {new.id} answers {said}, below --canary-min {self._canary_min}: it was not published, "
                f"{serving or 'nothing'} stays in service",
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
