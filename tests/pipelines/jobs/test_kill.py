"""A run survives the kill of any of its processes: run again, each passage has one adapter, as without the kill.

The moments are drawn from a seed over the time of an undisturbed run. An episode has its own store and kills each kind
of process once: the workers of a stage and the S3 server, which the run survives, and the driver, after which it is
run again. A kill that found no process does not count. There are as many episodes as it takes to kill each kind once.
`make test-long` runs it with ten kills on each backend. For twenty and another seed:

    PRAG_KILLS=20 PRAG_KILL_SEED=7 make test-long

It prints the seed, and who was killed how often.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import random
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from prag_core.identity import checksum
from prag_core.records import LedgerRow, from_table
from prag_core.store.adapters import LedgerSource, open_adapters
from prag_core.store.objects import Store
from prag_core.store.snapshot import load_snapshot
from tests.helpers.killing import Cluster, Driver, cluster, wait
from tests.helpers.passages import make_passage
from tests.helpers.s3 import S3Server
from tests.helpers.workspace import Workspace

pytestmark = pytest.mark.long

PASSAGES = 60
KILLS = int(os.environ.get("PRAG_KILLS", "1"))
SEED = int(os.environ.get("PRAG_KILL_SEED", "25"))
SERVER_AWAY_S = 2.0
# The stages whose workers are killed, by their modules; a run has them one after the other.
STAGES = ("pipelines.stages.augment", "pipelines.stages.train")


@dataclass(frozen=True)
class Undisturbed:
    """A run without kills: its result, and when each process lived, in seconds since the run began."""

    adapters: dict[str, dict[str, Tensor]]
    lives: dict[str, tuple[float, float]]


class Scene:
    """A corpus and a cluster; makes stores, runs drivers and kills."""

    def __init__(self, folder: Path, ray: Cluster, server: S3Server) -> None:
        self.work = Workspace(folder, [make_passage(n) for n in range(PASSAGES)])
        self.work.write_corpus([make_passage(n) for n in range(PASSAGES)], extra="not json\n")
        self.ray = ray
        self.server = server

    def settings(self, store: str, many_commits_a_task: bool) -> dict[str, Any]:
        """Return a run's settings: tasks of a shard of four adapters, or of twelve that are committed one by one."""
        folder = self.work.folder
        return {
            "store": store,
            "storage": {"adapter_dtype": "float32", "shard_mb": 128 if many_commits_a_task else 4.5 * 5760 / 1e6},
            "corpus": {"path": str(folder / "corpus.jsonl")},
            "model": {"name": str(folder / "tiny"), "dtype": "float32"},
            "augment": {"generator": "none", "import_file": str(folder / "augmentations.jsonl"), "cloze": False},
            "train": {"epochs": 1},
            "run": {"train_batch": 12, "augment_batch": 4, "commit_every_s": 0 if many_commits_a_task else 120},
        }

    def new_store(self, backend: str) -> str:
        """Return the URL of an empty store."""
        name = f"kill-{uuid.uuid4().hex}"
        return str(self.work.folder / name) if backend == "folder" else f"s3://{self.server.bucket}/{name}"

    def start(self, settings: dict[str, Any]) -> Driver:
        environment = {**self.server.environment, "RAY_ADDRESS": self.ray.address, "HF_HUB_OFFLINE": "1"}
        return Driver(settings, environment, self.work.folder)

    def finish(self, driver: Driver) -> dict[str, Any] | None:
        wait(lambda: driver.ends_within(0.05), f"a run does not end: {driver.log}")
        wait(lambda: not any(any(self.ray.workers(stage)) for stage in STAGES), "a run's workers outlive it")
        return driver.report()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[Scene]:
    with cluster(s3_server.environment) as ray:
        yield Scene(tmp_path_factory.mktemp("kill"), ray, s3_server)
        assert ray.logs_with(s3_server.environment["AWS_SECRET_ACCESS_KEY"]) == []


@pytest.fixture(scope="module")
def undisturbed(scene: Scene) -> Undisturbed:
    store = scene.new_store("s3")
    begun = time.monotonic()
    driver = scene.start(scene.settings(store, many_commits_a_task=False))
    seen: dict[str, list[float]] = {stage: [] for stage in STAGES}
    wait(lambda: driver.joins or driver.ends_within(0), f"no run begins: {driver.log}")
    joined = time.monotonic() - begun
    while not driver.ends_within(0.05):
        for stage in STAGES:
            if any(scene.ray.workers(stage)):
                seen[stage].append(time.monotonic() - begun)
    ended = time.monotonic() - begun
    report = scene.finish(driver)
    assert report is not None, driver.log.read_text()
    lives = {stage: (times[0], times[-1]) for stage, times in seen.items()}
    made = Undisturbed(adapters_of(Store(store)), {**lives, "driver": (joined, ended), "server": (joined, ended)})
    check(Store(store), report, made)
    return made


@pytest.mark.parametrize("backend", ["folder", "s3"])
def test_killed_at_random_moments(backend: str, scene: Scene, undisturbed: Undisturbed) -> None:
    dice = random.Random(f"{SEED} {backend}")
    targets = ["driver", *STAGES] + (["server"] if backend == "s3" else [])
    killed: Counter[str] = Counter()
    runs = failed = episode = 0
    print(f"{backend}: seed {SEED}")
    while killed.total() < KILLS or not {*targets} <= {*killed}:
        assert episode < KILLS + 3, f"seed {SEED}: after {episode} episodes only {dict(killed)} were killed"
        store = scene.new_store(backend)
        settings = scene.settings(store, many_commits_a_task=episode % 2 == 0)
        shares = {target: dice.random() for target in targets}
        driver: Driver | None = None
        report = None
        for target in sorted(targets, key=lambda target: moment(undisturbed, target, shares[target])):
            if driver is None:
                driver, begun, runs = scene.start(settings), time.monotonic(), runs + 1
            first, last = undisturbed.lives[target]
            if target in STAGES:  # a disturbed run comes to them later, or finds that there is nothing to do for them
                wait(lambda d=driver, t=target: any(scene.ray.workers(t)) or d.ends_within(0), f"no {target} comes")
                pause = shares[target] * (last - first)
            else:
                pause = begun + moment(undisturbed, target, shares[target]) - time.monotonic()
            if not driver.ends_within(max(pause, 0)) and kill(target, driver, scene, dice):
                killed[target] += 1
            if driver.ends_within(0):
                report = scene.finish(driver)
                if report is not None:
                    break
                failed += target != "driver"
                driver = None
        for _ in range(3):
            if report is None:
                if driver is None:
                    driver, runs = scene.start(settings), runs + 1
                report = scene.finish(driver)
                log, driver = driver.log, None
        assert report is not None, log.read_text()
        check(Store(store), report, undisturbed)
        episode += 1
    print(
        f"{backend}, seed {SEED}: killed {dict(killed)} in {runs} runs of {episode} stores; "
        f"{failed} runs failed by themselves"
    )
    assert failed <= killed["server"]  # a worker's death ends no run


def moment(undisturbed: Undisturbed, target: str, share: float) -> float:
    first, last = undisturbed.lives[target]
    return first + share * (last - first)


def kill(target: str, driver: Driver, scene: Scene, dice: random.Random) -> bool:
    """Kill a process; return whether there was one. Of a stage's workers, the Ray actor or the child with the model."""
    if target == "driver":
        return driver.kill()
    if target == "server":
        scene.server.kill()
        time.sleep(SERVER_AWAY_S)
        scene.server.start()
        return True
    actors, children = scene.ray.workers(target)
    hit = 0
    for victim in dice.choice([actors, children or actors]):
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
            hit += 1
    return hit > 0


def check(store: Store, report: dict[str, Any], undisturbed: Undisturbed) -> None:
    """Check that a store is as an undisturbed run leaves it, apart from objects that nothing names."""
    # 1. One adapter for each passage; no committed adapter was trained again.
    rows = from_table(LedgerRow, store.get_table(LedgerRow, store.list("adapters", ".parquet")))
    assert Counter(row.key for row in rows) == Counter(dict.fromkeys(undisturbed.adapters, 1))
    # 2. In = out + rejected, in each stage.
    assert all(stage["balanced"] for stage in report["stages"])
    assert report["adapters"] == PASSAGES
    assert report["rejected"] == {"corpus/invalid_json": 1}
    assert load_snapshot(store).id == report["snapshot"]
    # 3. The adapters are those of the undisturbed run.
    made = adapters_of(store)
    worst = max(delta_error(made[key], expected) for key, expected in undisturbed.adapters.items())
    assert worst < 1e-5, worst
    # 4. Every object that has its final name is complete.
    for name in store.list("", ""):
        data = store.get(name)
        stem, suffix = posixpath.splitext(posixpath.basename(name))
        if suffix == ".safetensors":
            assert stem == checksum(data), name
        elif suffix == ".parquet":
            assert stem == f"part-{checksum(data)}", name
            pq.read_table(pa.BufferReader(data))
        elif suffix == ".json":
            json.loads(data)


def adapters_of(store: Store) -> dict[str, dict[str, Tensor]]:
    """Return the adapters that the snapshot in service names, each fetched and verified."""
    snapshot = load_snapshot(store)
    adapters, _ = open_adapters(store, snapshot.recipe)
    source = LedgerSource(adapters, snapshot.ledger_parts)
    keys = [make_passage(n).key for n in range(PASSAGES)]
    return {key: source.get(key) for key in keys}


def delta_error(made: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the relative error of an adapter's ΔW, over all its modules."""
    error = norm = 0.0
    for name in expected:
        if name.endswith(".A"):
            other = name.removesuffix("A") + "B"
            left, right = (torch.matmul(f[other].double(), f[name].double()) for f in (made, expected))
            error += float((left - right).square().sum())
            norm += float(right.square().sum())
    return float((error / norm) ** 0.5)
