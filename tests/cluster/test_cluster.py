"""The main job on a Ray cluster of several nodes survives lost and added nodes and a killed driver."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
from ray._raylet import GcsClient

from tests.helpers.passages import make_passage
from tests.helpers.workspace import Workspace, stage

pytestmark = [pytest.mark.slow, pytest.mark.serial]

MB = 1024 * 1024
PASSAGES = 12


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

    def environment(self) -> dict[str, str]:
        return {"RAY_ADDRESS": self.cluster.address}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_idle_worker_killing_time_threshold_ms", "600000")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        nodes = Nodes()
        try:
            yield nodes
        finally:
            nodes.cluster.shutdown()


@pytest.fixture
def work(tmp_path: Path, nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace whose commands run on the cluster, with the paths that every node sees."""
    for name, value in nodes.environment().items():
        monkeypatch.setenv(name, value)
    work = Workspace(tmp_path, [make_passage(n) for n in range(PASSAGES)])
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["store"] = str(tmp_path / "store")
    config["corpus"]["path"] = str(tmp_path / "corpus.jsonl")
    config["model"]["name"] = str(tmp_path / "tiny")
    config["augment"]["import_file"] = str(tmp_path / "augmentations.jsonl")
    config["train"] = {"epochs": 12}
    config["run"] = {
        "profile": "cluster",
        "actor_cpus": 1,
        "actor_gpus": 0,
        "actors_max": 3,
        "partitions": 2,
        "train_batch": 2,
        "augment_batch": 8,
        "tokens_per_step": 1024,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return work


def until_committed(work: Workspace, parts: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while len(list((work.folder / "store" / "adapters").glob("*/ledger/**/*.parquet"))) < parts:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def until_says(process: subprocess.Popen, text: str) -> None:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if text in line:
            return
    raise AssertionError("".join(said)[-3000:])


def test_nodes_lost_and_added_and_the_driver_killed(work: Workspace, nodes: Nodes) -> None:
    # 1. A node is lost while it trains, and another one is added.
    first = work.start("run", "-c", "config.yaml")
    until_committed(work, 1, first)
    nodes.lose(nodes.workers.pop(0))
    nodes.workers.append(nodes.add())
    until_committed(work, 3, first)
    # 2. The driver is killed, and started again.
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = work.start("run", "-c", "config.yaml", "--json")
    # 3. The node that was there from the beginning is lost while the survey shuffles.
    until_says(second, "corpus: ")
    nodes.lose(nodes.workers.pop(0))
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err[-3000:]
    # All adapters are there, each once.
    report = json.loads(out)
    assert report["adapters"] == PASSAGES
    assert all(s["balanced"] for s in report["stages"])
    assert 6 <= stage(report, "train")["earlier"] < PASSAGES
    keys = [row.key for row in work.ledger()]
    assert len(keys) == len(set(keys)) == PASSAGES


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
