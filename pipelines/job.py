"""The main job: corpus → augment → train → store → index → publish. Running it again does only what is missing."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.resources import PROFILES
from cluster.session import ray_session
from pipelines import augment, index, ingest, parameterize
from pipelines.report import StageReport
from pipelines.tables import survey
from prag_core.adapter_io import import_peft
from prag_core.adapter_store import AdapterStore, put_start, start_fingerprint
from prag_core.augment_import import read_augmentations
from prag_core.config import Config, dump_config
from prag_core.corpus import list_files
from prag_core.errors import BudgetError, PragError
from prag_core.lease import Lease, hold_lease
from prag_core.lora import LoraLayout, find_targets
from prag_core.models import model_fingerprint, model_skeleton, resolve_model
from prag_core.opened import check_base_model
from prag_core.recipe import Recipe, augment_recipe, train_recipe
from prag_core.retrieval import find_jdk
from prag_core.snapshot import current_id, load_snapshot, make_snapshot, publish
from prag_core.store import Store, open_store


@dataclass(frozen=True)
class RunReport:
    """What a run did: a report a stage, and the snapshot that is in service after it."""

    run: str
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
            "snapshot": self.snapshot,
            "recipe": self.recipe,
            "adapters": self.adapters,
            "rejected": self.rejected,
            "seconds": round(self.seconds, 2),
            "stages": [stage.to_json() for stage in self.stages],
        }


def describe(config: Config) -> tuple[Recipe, LoraLayout]:
    """Return the recipe that a configuration means and the layout of its adapters; loads no weights.

    Raises:
        ConfigError, ModelError: when a recipe is unknown, or the model is missing or does not fit.
        AdapterError: when `train.start` is no adapter of the recipe's shape.
    """
    train = train_recipe(config.train)
    folder = resolve_model(config.model.name)
    layout, _ = find_targets(model_skeleton(folder), train)
    if config.train.start:
        train = replace(train, start=start_fingerprint(import_peft(layout, Path(config.train.start))))
    base_model = model_fingerprint(folder)
    augmenting = augment_recipe(config.augment, augment.generator_fingerprint(config, base_model))
    return Recipe(base_model, augmenting, train), layout


def preflight(config: Config, store: Store, base_model: str) -> None:
    """Check in seconds what would otherwise fail after an hour.

    Raises:
        InputError: when the corpus or the file of augmentations cannot be read.
        StoreError: when the store cannot be written, or serves another base model.
        RetrievalError: when there is no Java to index with.
    """
    list_files(config.corpus)
    if config.augment.import_file:
        read_augmentations(config.augment.import_file)
    store.check_writable()
    find_jdk()
    if current_id(store) is not None:
        check_base_model(load_snapshot(store), store, config.model.name, base_model)


def run_job(config: Config, console: Console, *, take_over: bool = False) -> RunReport:
    """Run the main job on the Ray of the configured profile, holding the store's lease, and return its report.

    Raises:
        LeaseError: when another run works on this store, and `take_over` does not say that it is dead.
        PragError: a child of it that says what to do; see `preflight`, `ingest`.
        BudgetError: when more passages were rejected than `run.max_reject_share` allows; what was made stays.
    """
    begun = time.perf_counter()
    store = open_store(config)
    recipe, layout = describe(config)
    preflight(config, store, recipe.base_model)
    run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    with hold_lease(store, run, take_over=take_over) as lease:
        return _run(config, store, recipe, layout, lease, console, begun)


def _run(
    config: Config, store: Store, recipe: Recipe, layout: LoraLayout, lease: Lease, console: Console, begun: float
) -> RunReport:
    run, profile = lease.record.run, PROFILES[config.run.profile]
    store.put(f"runs/{run}/config.yaml", dump_config(config).encode())
    AdapterStore(store, recipe, layout).describe()
    if config.train.start:
        put_start(store, layout, import_peft(layout, Path(config.train.start)))
    stages: list[StageReport] = []
    console.print(f"run {run}: store {store.url}, recipe {recipe.fingerprint}; starting Ray")
    with ray_session(profile):
        # 1. Corpus.
        corpus = ingest.ingest(config.corpus, profile.partitions)
        ingest.store_corpus(store, corpus, run)
        stages.append(_finish(store, run, stages, corpus.report, console))
        # 2. Augment.
        missing = survey(store, corpus.passages, recipe, profile.partitions)
        report = augment.run_augment(config, store, profile, recipe.augment, corpus.passages, missing, run, console)
        stages.append(_finish(store, run, stages, report, console))
        # 3. Train and store.
        if missing.counts["to_augment"]:
            missing = survey(store, corpus.passages, recipe, profile.partitions)
        report = parameterize.run_train(config, store, profile, recipe, corpus.passages, missing, run, console)
        stages.append(_finish(store, run, stages, report, console))
        adapters = report.done
        # 4. Index.
        index_id, report = index.run_index(store, corpus.version, config.index, corpus.count)
        stages.append(_finish(store, run, stages, report, console))
    rejected = corpus.count - adapters
    if rejected > config.run.max_reject_share * corpus.count:
        raise BudgetError(
            f"{rejected} of {corpus.count} passages were rejected, more than run.max_reject_share = "
            f"{config.run.max_reject_share}: {_reasons(stages)}; nothing was published",
            "see `prag rejects`; mend the cause or raise run.max_reject_share",
        )
    # 5. Publish, unless another run took the store over meanwhile.
    lease.check()
    snapshot = make_snapshot(
        corpus_version=corpus.version,
        index=index_id,
        recipe=recipe.fingerprint,
        base_model=recipe.base_model,
        ledger_parts=tuple(AdapterStore(store, recipe, layout).ledger_parts()),
        passages=corpus.count,
        adapters=adapters,
    )
    publish(store, snapshot)
    result = RunReport(
        run=run,
        snapshot=current_id(store) or "",
        recipe=recipe.fingerprint,
        stages=tuple(stages),
        seconds=time.perf_counter() - begun,
    )
    store.put_json(f"runs/{run}/report.json", result.to_json())
    return result


def _finish(store: Store, run: str, before: list[StageReport], report: StageReport, console: Console) -> StageReport:
    if not report.balanced:
        raise PragError(
            f"{report.stage}: {report.taken} in, but {report.done} done and {dict(report.rejected)} rejected"
        )
    new = report.done - report.earlier
    console.print(
        f"{report.stage}: {report.taken} in = {report.done} done ({report.earlier} earlier) + "
        f"{sum(report.rejected.values())} rejected; {new} new in {report.seconds:.1f} s"
    )
    progress = {"stages": [stage.to_json() for stage in [*before, report]]}
    store.put(f"runs/{run}/progress.json", json.dumps(progress, indent=2).encode())
    return report


def _reasons(stages: list[StageReport]) -> str:
    counts = [(n, f"{s.stage}/{reason}") for s in stages for reason, n in s.rejected.items()]
    return ", ".join(f"{reason} {n}" for n, reason in sorted(counts, reverse=True)[:5])
