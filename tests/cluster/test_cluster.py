"""The main job on a Ray cluster survives the loss of nodes, of workers, of the store and of its driver."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
from ray._raylet import GcsClient

from prag_core.config_file import load_config
from prag_core.records import LedgerRow
from prag_core.store.objects import Store, open_store
from tests.helpers.killing import stage_workers, wait
from tests.helpers.passages import make_passage
from tests.helpers.s3 import S3Server
from tests.helpers.training import assert_same_adapters, train_here
from tests.helpers.workspace import Workspace, stage

pytestmark = pytest.mark.slow

MB = 1024 * 1024
PASSAGES = [make_passage(n) for n in range(20)]
TRAIN = "pipelines.stages.train"


class Nodes:
    """A cluster whose head has no CPUs, as on Kubernetes, so that all work is on nodes that can be lost."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": 80 * MB, "include_dashboard": False},
        )
        self.workers = [self.add(), self.add()]

    def add(self):
        return self.cluster.add_node(num_cpus=2, object_store_memory=150 * MB)

    def lose(self, node) -> None:
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def nodes(s3_server: S3Server) -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_idle_worker_killing_time_threshold_ms", "600000")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        nodes = Nodes()
        try:
            yield nodes
        finally:
            nodes.cluster.shutdown()


@pytest.fixture
def work(tmp_path: Path, nodes: Nodes, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace whose commands run on the cluster, with a store on S3 and files that every node sees."""
    monkeypatch.setenv("RAY_ADDRESS", nodes.cluster.address)
    work = Workspace(tmp_path, PASSAGES)
    work.configure(
        store=f"s3://{s3_server.bucket}/{uuid.uuid4().hex}",
        storage={"adapter_dtype": "float32"},
        model={"name": str(tmp_path / "tiny"), "dtype": "float32"},
        train={"epochs": 12},
        run={
            "profile": "cluster",
            "actor_cpus": 1,
            "actor_gpus": 0,
            "actors_max": 3,
            "partitions": 2,
            "train_batch": 2,
            "augment_batch": 8,
            "tokens_per_step": 1024,
        },
    )
    return work


def until_committed(store: Store, parts: int, process: subprocess.Popen[str]) -> None:
    def committed() -> bool:
        assert process.poll() is None, process.communicate()[1][-3000:]
        return len(store.list("adapters", ".parquet")) >= parts

    wait(committed, f"no {parts} parts of the ledger")


def until_says(process: subprocess.Popen, text: str) -> None:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if text in line:
            return
    raise AssertionError("".join(said)[-3000:])


def test_a_run_survives_the_loss_of_nodes_workers_the_store_and_its_driver(
    work: Workspace, nodes: Nodes, s3_server: S3Server
) -> None:
    config = load_config(work.folder / "config.yaml")
    store = open_store(config)
    # 1. A node is lost while it trains, and another one is added.
    first = work.start("run", "-c", "config.yaml")
    until_committed(store, 1, first)
    nodes.lose(nodes.workers.pop(0))
    nodes.workers.append(nodes.add())
    # 2. The processes that train are killed, and the store is away for a second.
    until_committed(store, 2, first)
    wait(lambda: stage_workers(psutil.Process(), TRAIN)[1], "no process trains")
    for child in stage_workers(psutil.Process(), TRAIN)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    s3_server.kill()
    time.sleep(1)
    s3_server.start()
    # 3. The driver is killed, and started again.
    until_committed(store, 4, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = work.start("run", "-c", "config.yaml", "--json")
    # 4. The node that was there from the beginning is lost while the survey shuffles.
    until_says(second, "corpus: ")
    nodes.lose(nodes.workers.pop(0))
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err[-3000:]
    # All adapters are there, each once, as they are without any loss.
    report = json.loads(out)
    assert report["adapters"] == len(PASSAGES)
    assert report["rejected"] == {}
    assert all(s["balanced"] for s in report["stages"])
    assert 4 <= stage(report, "train")["earlier"] < len(PASSAGES)
    keys = store.get_table(LedgerRow, store.list("adapters", ".parquet"), ["key"])["key"].to_pylist()
    assert len(keys) == len(set(keys)) == len(PASSAGES)
    alone = config.model_copy(update={"store": str(work.folder / "alone")})
    assert_same_adapters(store, train_here(alone, PASSAGES), PASSAGES)


@contextlib.contextmanager
def another_version_of_ray(address: str) -> Iterator[None]:
    """Within this context the cluster reports another version of Ray."""
    gcs, key = GcsClient(address=address), b"CLUSTER_METADATA"
    before = gcs.internal_kv_get(key, KV_NAMESPACE_CLUSTER)
    after = json.dumps({**json.loads(before), "ray_version": "2.59.0"}).encode()
    gcs.internal_kv_put(key, after, True, KV_NAMESPACE_CLUSTER)
    try:
        yield
    finally:
        gcs.internal_kv_put(key, before, True, KV_NAMESPACE_CLUSTER)


def test_a_cluster_with_another_version_of_ray_is_reported_with_the_other_errors(work: Workspace, nodes: Nodes) -> None:
    with another_version_of_ray(nodes.cluster.address):
        process = work.start("preflight", "-c", "config.yaml", "--json", "--set", "corpus.path=/none.jsonl")
        out, err = process.communicate(timeout=120)
    assert process.returncode == 11, err[-3000:]
    failed = {f["check"]: f["detail"] for f in json.loads(out)["findings"] if f["outcome"] == "failed"}
    assert set(failed) == {"corpus", "cluster"}
    assert "Ray: 2.59.0" in failed["cluster"]
    assert "Traceback" not in err


def test_preflight_finds_what_only_nodes_know(work: Workspace, nodes: Nodes) -> None:
    wrong = ["--set", "store=here", "--set", "run.actor_cpus=64"]
    process = work.start("preflight", "-c", "config.yaml", "--json", *wrong)
    out, err = process.communicate(timeout=120)
    findings = json.loads(out)["findings"]
    failed = [(f["check"], f["where"]) for f in findings if f["outcome"] == "failed"]
    alive = 1 + len(nodes.workers)
    assert len({where for _, where in failed}) == alive, err[-3000:]
    assert {check for check, _ in failed} == {"store"}
    assert "is another one there" in err
    assert {f["check"]: f["outcome"] for f in findings if f["outcome"] != "failed"} == {
        "corpus": "ok",
        "augmentations": "ok",
        "model": "ok",
        "store": "ok",
        "Java": "ok",
        "snapshot": "ok",
        "versions": "ok",
        "inputs": "ok",
        "resources": "warning",
    }
    assert process.returncode == (11 if alive > 1 else 1)
