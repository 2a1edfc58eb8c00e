"""The main job: corpus → augment → train → store → index → publish. Running it again does only what is missing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.preflight import on_cluster
from cluster.resources import Profile
from cluster.session import ray_session
from pipelines.execution.outcomes import Budget, StageReport
from pipelines.execution.progress import RunProgress
from pipelines.execution.recovery import retry_on_loss
from pipelines.execution.survey import Survey, survey
from pipelines.planning.checks import PreflightReport
from pipelines.planning.preflight import check_here, check_nodes, preflight
from pipelines.settings import profile_of
from pipelines.stages import augment, index, ingest
from pipelines.stages import train as parameterize
from prag_core.config import Config
from prag_core.config_file import dump_config
from prag_core.identity import is_checksum
from prag_core.llm.layout import LoraLayout
from prag_core.recipe import Recipe
from prag_core.store.adapters import AdapterStore, get_start, put_start
from prag_core.store.objects import Store, open_store
from prag_core.store.runs import RunInputs, RunLease, hold_lease, new_run_id, put_inputs, wait_for_lease
from prag_core.store.snapshot import (
    Snapshot,
    current_id,
    forgotten_now,
    load_snapshot,
    make_snapshot,
    publish,
    same_content,
)

# Called with the snapshot in service, if there is one, and with the one that is about to take its place, unless both
# say the same; it raises to prevent that. Ray runs meanwhile.
Gate = Callable[[Snapshot | None, Snapshot, RunProgress], None]


@dataclass(frozen=True)
class RunReport:
    """What a run did: a report a stage, and the snapshots that were in service before and after it."""

    run: str
    before: str | None
    snapshot: str
    recipe: str
    stages: tuple[StageReport, ...]
    seconds: float

    @property
    def rejected(self) -> dict[str, int]:
        """Rejects by reason, over all stages."""
        return {f"{s.stage}/{reason}": n for s in self.stages for reason, n in sorted(s.rejected.items())}

    @property
    def adapters(self) -> int:
        """Passages that have an adapter."""
        return next(stage.done for stage in self.stages if stage.stage == "train")

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {
            "run": self.run,
            "before": self.before,
            "snapshot": self.snapshot,
            "recipe": self.recipe,
            "adapters": self.adapters,
            "rejected": self.rejected,
            "seconds": round(self.seconds, 2),
            "stages": [stage.to_json() for stage in self.stages],
        }


def run_job(
    config: Config,
    console: Console,
    *,
    take_over: bool = False,
    wait_s: float = 0.0,
    gate: Gate | None = None,
    run: str = "",
) -> RunReport:
    """Run the main job on the Ray of the configured profile, holding the store's lease, and return its report.

    A lease that another run holds is waited for, `wait_s` at most. `gate` may keep what was made from being published.
    `run` is the run's id, by default a new one.

    Raises:
        LeaseError: when another run works on this store, and `take_over` does not say that it is dead.
        PragError: what `pipelines.planning.preflight` finds wrong, or a stage; each says what to do.
        BudgetError: when more passages were rejected than `run.max_reject_share` allows; what was made stays.
        ConflictError: when somebody else published meanwhile.
        JoinError: when the cluster that RAY_ADDRESS names cannot be joined.
    """
    begun = time.perf_counter()
    found = check_here(config)
    if found.errors:
        # The nodes are asked too, so that one look names everything.
        (preflight(config) if on_cluster() else found).described()
    console.print(found.summary())
    store, (recipe, layout) = open_store(config), found.described()
    if wait_s and not take_over:
        wait_for_lease(store, wait_s)
    with hold_lease(store, run or new_run_id(), take_over=take_over) as lease:
        return _run(config, store, recipe, layout, lease, console, begun, gate)


def _run(
    config: Config,
    store: Store,
    recipe: Recipe,
    layout: LoraLayout,
    lease: RunLease,
    console: Console,
    begun: float,
    gate: Gate | None,
) -> RunReport:
    run, profile = lease.record.run, profile_of(config)
    store.put(f"runs/{run}/config.yaml", dump_config(config).encode())
    AdapterStore(store, recipe, layout).describe()
    if config.train.initial_adapter:
        _keep_start(config.train.initial_adapter, store, layout)
    console.print(f"run {run}: store {store.url}, recipe {recipe.fingerprint}; starting Ray")
    progress = RunProgress(store, run, console)
    with progress.until_the_end(), ray_session(profile):
        if on_cluster():
            found = PreflightReport(recipe=recipe, layout=layout)
            check_nodes(config, found)
            console.print(found.summary())
            found.described()
        return _stages(config, store, recipe, layout, lease, profile, progress, begun, gate)


def _keep_start(start: str, store: Store, layout: LoraLayout) -> None:
    """Put the factors that adapters start from into the store, or look whether it has them under that name."""
    from prag_core.llm.lora import check_factors
    from prag_core.llm.peft import import_peft

    if is_checksum(start):
        check_factors(layout, get_start(store, start), f"start {start}")
    else:
        put_start(store, layout, import_peft(layout, Path(start)))


def _stages(
    config: Config,
    store: Store,
    recipe: Recipe,
    layout: LoraLayout,
    lease: RunLease,
    profile: Profile,
    progress: RunProgress,
    begun: float,
    gate: Gate | None,
) -> RunReport:
    run = progress.run
    # What serves now is what this run's snapshot may replace, and nothing that is published meanwhile.
    serving = current_id(store)
    before = load_snapshot(store, serving) if serving else None
    forgotten = before.tombstones if before else tuple(sorted(forgotten_now(store)))
    # 1. Corpus. What follows reads it from the store: Ray's memory of it is lost with a node.
    corpus = retry_on_loss("corpus", lambda: _read_corpus(config, store, profile, run, forgotten), progress)
    put_inputs(store, run, RunInputs(corpus.version, recipe.fingerprint))
    progress.finish(corpus.report)
    bad = {f"corpus/{reason}": n for reason, n in corpus.report.rejected.items()}
    budget = Budget(corpus.count + sum(bad.values()), config.run.max_reject_share, bad)
    budget.check({})
    passages = ingest.stored_passages(store, corpus.version, profile.partitions)

    def look() -> Survey:
        return survey(store, passages, corpus.count, recipe, profile)

    # 2. Augment.
    missing = retry_on_loss("augment", look, progress)
    report = augment.run_augment(config, store, profile, recipe.augment, passages, missing, look, budget, progress)
    progress.finish(report)
    # 3. Train and store.
    if missing.counts["to_augment"]:
        missing = retry_on_loss("train", look, progress)
    report = parameterize.run_train(config, store, profile, recipe, layout, passages, missing, look, budget, progress)
    adapters = progress.finish(report).done
    # 4. Index.
    former = before.corpus_version if before else None
    index_id, report = index.run_index(store, corpus.version, former, config.index, corpus.count, profile.index_cpus)
    progress.finish(report)
    reasons = {f"{s.stage}/{reason}": n for s in progress.stages[1:] for reason, n in s.rejected.items()}
    budget.check(reasons)
    # 5. Publish, unless another run took the store over or published meanwhile.
    snapshot = make_snapshot(
        corpus_version=corpus.version,
        index=index_id,
        recipe=recipe.fingerprint,
        base_model=recipe.base_model,
        ledger_parts=tuple(AdapterStore(store, recipe, layout).ledger_parts()),
        passages=corpus.count,
        adapters=adapters,
        tombstones=forgotten,
    )
    if gate is not None and (before is None or not same_content(before, snapshot)):
        gate(before, snapshot, progress)
    lease.check()
    publish(store, snapshot, replaces=serving)
    result = RunReport(
        run=run,
        before=serving,
        snapshot=current_id(store) or "",
        recipe=recipe.fingerprint,
        stages=progress.stages,
        seconds=time.perf_counter() - begun,
    )
    store.put_json(f"runs/{run}/report.json", result.to_json())
    return result


def _read_corpus(config: Config, store: Store, profile: Profile, run: str, forgotten: tuple[str, ...]) -> ingest.Corpus:
    corpus = ingest.ingest(config.corpus, profile, forgotten)
    ingest.store_corpus(store, corpus, run)
    return corpus
