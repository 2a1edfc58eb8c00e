"""Status: the runs of a store and their progress, read from the store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pipelines.words import counted, duration
from prag_core.errors import DamagedError
from prag_core.records import from_document
from prag_core.store.objects import Store
from prag_core.store.runs import LeaseRecord, is_over, read_lease
from prag_core.store.snapshot import Snapshot, current_id, load_snapshot

State = Literal["running", "finished", "failed", "stopped"]


@dataclass(frozen=True)
class RunStatus:
    """A run according to its `runs/<run>/progress.json`.

    `state` is `stopped` when the run neither ended nor holds the store's lease: a signal stopped it, it was killed, or
    its machine is gone. `current` is the stage that is running.
    """

    run: str
    state: State
    started: str = ""
    updated: str = ""
    stages: list[dict[str, Any]] = field(default_factory=list)
    current: dict[str, Any] | None = None
    recoveries: int = 0
    error: str = ""

    def line(self) -> str:
        """Return the status in one line."""
        parts = [f"run {self.run}: {self.state}"]
        parts += [f"{stage['stage']} {stage['done']}/{stage['taken']}" for stage in self.stages]
        if self.current and self.state != "finished":
            now = self.current
            share = f" ({now['share']:.0%})" if "share" in now else ""
            rejected = f"{sum(now['rejected'].values())} rejected"
            if self.state == "running":
                left = "" if now["seconds_left"] is None else f", {duration(now['seconds_left'])} left"
                share, rejected = f"{share} now", f"{rejected}, {now['passages_per_s']:.2f} passages/s{left}"
            parts.append(f"{now['stage']} {now['done']}/{now['total']}{share}, {rejected}")
        if self.recoveries:
            parts.append(f"{counted(self.recoveries, 'loss', 'losses')} survived")
        if self.error:
            parts.append(self.error.splitlines()[0])
        return "; ".join(parts)


@dataclass(frozen=True)
class StoreStatus:
    """The snapshot in service and the runs, the newest run last."""

    store: str
    snapshot: Snapshot | None
    runs: tuple[RunStatus, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the status as plain values."""
        runs = [{**asdict(run), "finished": run.state == "finished"} for run in self.runs]
        return {"store": self.store, "snapshot": asdict(self.snapshot) if self.snapshot else None, "runs": runs}


def read_status(store: Store, newest: int = 5) -> StoreStatus:
    """Return the status of a store and of its newest runs.

    Raises:
        StoreError: when it cannot be read.
    """
    names = sorted({name.split("/")[1] for name in store.list("runs", "/config.yaml")})
    lease = read_lease(store)
    runs = tuple(read_run(store, name, lease) for name in names[-newest:])
    return StoreStatus(store.url, load_snapshot(store) if current_id(store) else None, runs)


def read_run(store: Store, run: str, lease: LeaseRecord | None) -> RunStatus:
    """Return the status of one run; `lease` is the store's lease, which says whether the run is alive.

    Raises:
        StoreError: when it cannot be read.
    """
    name = f"runs/{run}/progress.json"
    document = store.get_json(name) if store.exists(name) else {"run": run, "state": "running"}
    try:
        status = from_document(RunStatus, document)
    except TypeError as error:
        raise DamagedError(f"{store.url}/{name}: not a run's progress: {error}") from None
    alive = lease and lease.run == run and not is_over(lease)
    return replace(status, state="stopped") if status.state == "running" and not alive else status


def watch(store: Store, every_s: float) -> Iterator[RunStatus]:
    """Yield the status of the newest run whenever it changes, until the run ends; nothing if there is no run."""
    last = None
    while True:
        runs = read_status(store, newest=1).runs
        if not runs:
            return
        if runs[0] != last:
            last = runs[0]
            yield last
        if last.state != "running":
            return
        time.sleep(every_s)
