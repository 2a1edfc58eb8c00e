"""The main job: corpus → augment → train → index → publish. Running it again does only the work that is missing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.preflight import on_cluster
from cluster.session import ray_session
from pipelines.execution.outcomes import Budget, StageReport
from pipelines.execution.progress import RunProgress
from pipelines.execution.recovery import retry_on_loss
from pipelines.execution.spinner import spinner
from pipelines.execution.survey import Survey, survey
from pipelines.planning.checks import PreflightReport
from pipelines.planning.preflight import check_here, check_nodes, preflight
from pipelines.settings import RunContext, make_context
from pipelines.stages.augment import run_augment
from pipelines.stages.index import run_index
from pipelines.stages.ingest import Corpus, ingest, store_corpus, stored_passages
from pipelines.stages.train import run_train
from prag_core.config import Config
from prag_core.config_file import dump_config
from prag_core.identity import is_checksum
from prag_core.store.adapters import AdapterStore, get_start, put_start
from prag_core.store.runs import RunInputs, RunLease, hold_lease, new_run_id, put_config, put_inputs, wait_for_lease
from prag_core.store.snapshot import (
    Snapshot,
    created_now,
    current_id,
    forgotten_now,
    kept_route,
    load_snapshot,
    publish,
    same_content,
)

# Called before a snapshot is published: with the run, the snapshot in service (or None), the new one, and the
# progress. It raises to prevent the publication. Ray is running. It is not called when the content is the same.
Gate = Callable[[RunContext, Snapshot | None, Snapshot, RunProgress], None]


@dataclass(frozen=True)
class RunReport:
    """What a run did: the reports of its stages, and the snapshots in service before and after it."""

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
        counts = {"adapters": self.adapters, "rejected": self.rejected, "seconds": round(self.seconds, 2)}
        return {**vars(self), **counts, "stages": [stage.to_json() for stage in self.stages]}


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

    If another run holds the lease, wait for it at most `wait_s`. `gate` may prevent the publication. `run` is the id
    of the run, by default a new one.

    Raises:
        LeaseError: when another run works on this store, unless `take_over` says that it is dead.
        PragError: when `pipelines.planning.preflight` finds something wrong, or a stage fails; each says what to do.
        BudgetError: when more passages were rejected than `run.max_reject_share` allows; what was stored stays.
        ConflictError: when another snapshot was published meanwhile.
        JoinError: when the cluster that RAY_ADDRESS names cannot be joined.
    """
    begun = time.perf_counter()
    with spinner(console, "checking settings, model and corpus"):
        found = check_here(config)
        if found.errors:
            # Check the nodes too, so that all errors are named at once.
            (preflight(config) if on_cluster() else found).raise_errors()
    console.print(found.summary())
    context = make_context(config, run or new_run_id())
    if wait_s and not take_over:
        wait_for_lease(context.store, wait_s)
    with hold_lease(context.store, context.run, take_over=take_over) as lease:
        return _run(context, lease, console, begun, gate)


def _run(context: RunContext, lease: RunLease, console: Console, begun: float, gate: Gate | None) -> RunReport:
    config, store = context.config, context.store
    put_config(store, context.run, dump_config(config))
    AdapterStore(store, context.recipe, context.layout).describe()
    if config.train.initial_adapter:
        _store_start(context, config.train.initial_adapter)
    console.print(f"run {context.run}: store {store.url}, recipe {context.recipe.fingerprint}")
    progress = RunProgress(store, context.run, console)
    with progress.running(), contextlib.ExitStack() as session:
        with spinner(console, "starting Ray"):
            session.enter_context(ray_session(context.profile))
        if on_cluster():
            found = PreflightReport(layout=context.layout)
            check_nodes(config, context.profile, found)
            console.print(found.summary())
            found.raise_errors()
        return _run_stages(context, lease, progress, begun, gate)


def _store_start(context: RunContext, start: str) -> None:
    """Store the factors that all adapters start from; if they are given by name, check those in the store."""
    from prag_core.llm.lora import check_factors
    from prag_core.llm.peft import import_peft, peft_base

    store, layout = context.store, context.layout
    if is_checksum(start):
        check_factors(layout, get_start(store, start), f"start {start}")
    else:
        base = peft_base(context.config.model.name)
        put_start(store, layout, import_peft(layout, Path(start), base))


def _run_stages(
    context: RunContext, lease: RunLease, progress: RunProgress, begun: float, gate: Gate | None
) -> RunReport:
    config, store, recipe = context.config, context.store, context.recipe
    # This run's snapshot may replace the one that is in service now, and no other.
    serving = current_id(store)
    before = load_snapshot(store, serving) if serving else None
    tombstones = before.tombstones if before else tuple(sorted(forgotten_now(store)))
    # 1. Corpus. The next stages read it from the store: Ray would lose it with a node.
    with spinner(progress.console, "reading the corpus"):
        corpus = retry_on_loss("corpus", lambda: _read_corpus(context, tombstones), progress)
    put_inputs(store, context.run, RunInputs(corpus.version, recipe.fingerprint))
    progress.finish(corpus.report)
    bad = {f"corpus/{reason}": n for reason, n in corpus.report.rejected.items()}
    budget = Budget(corpus.count + sum(bad.values()), config.run.max_reject_share, bad)
    budget.check({})
    passages = stored_passages(store, corpus.version, context.profile.partitions)

    def take_survey() -> Survey:
        with spinner(progress.console, "looking for what is missing"):
            return survey(store, passages, corpus.count, recipe, context.profile)

    # 2. Augment.
    found = retry_on_loss("augment", take_survey, progress)
    progress.finish(run_augment(context, passages, found, take_survey, budget, progress))
    # 3. Train and store.
    if found.counts["to_augment"]:
        found = retry_on_loss("train", take_survey, progress)
    adapters = progress.finish(run_train(context, passages, found, take_survey, budget, progress)).done
    # 4. Index.
    with spinner(progress.console, "indexing"):
        index, report = run_index(context, corpus.version, before.corpus_version if before else None, corpus.count)
    progress.finish(report)
    budget.check({f"{s.stage}/{reason}": n for s in progress.stages[1:] for reason, n in s.rejected.items()})
    # 5. Publish, unless another run has taken over the lease or published meanwhile.
    snapshot = created_now(
        Snapshot(
            corpus_version=corpus.version,
            index=index,
            recipe=recipe.fingerprint,
            base_model=recipe.base_model,
            ledger_parts=tuple(AdapterStore(store, recipe, context.layout).ledger_parts()),
            passages=corpus.count,
            adapters=adapters,
            tombstones=tombstones,
            route=kept_route(before, recipe.fingerprint),
        )
    )
    if gate is not None and (before is None or not same_content(before, snapshot)):
        gate(context, before, snapshot, progress)
    lease.check()
    publish(store, snapshot, replaces=serving)
    result = RunReport(
        run=context.run,
        before=serving,
        snapshot=current_id(store) or "",
        recipe=recipe.fingerprint,
        stages=progress.stages,
        seconds=time.perf_counter() - begun,
    )
    store.put_json(f"runs/{context.run}/report.json", result.to_json())
    return result


def _read_corpus(context: RunContext, tombstones: tuple[str, ...]) -> Corpus:
    corpus = ingest(context.config.corpus, context.profile, tombstones, context.config.storage)
    store_corpus(context.store, corpus, context.run)
    return corpus
