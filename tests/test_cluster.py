"""The main job on a real Ray cluster of several nodes, which lose power, come up, and lose their driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import make_passage
from test_job import Workspace, new, stage

pytestmark = pytest.mark.slow

MB = 1024 * 1024
PASSAGES = 16


class Nodes:
    """A cluster whose head computes nothing, as on Kubernetes, so that all work is on nodes that can be lost."""

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
    while len(list((work.folder / "store" / "adapters").glob("*/ledger/*.parquet"))) < parts:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_complete_and_once(work: Workspace, report: dict) -> None:
    assert report["adapters"] == PASSAGES
    assert all(s["balanced"] for s in report["stages"])
    keys = [row.key for row in work.ledger()]
    assert len(keys) == len(set(keys)) == PASSAGES


def test_nodes_lost_and_added_in_mid_run(work: Workspace, nodes: Nodes) -> None:
    process = work.start("run", "-c", "config.yaml", "--json")
    until_committed(work, 1, process)
    nodes.lose(nodes.workers.pop(0))
    nodes.workers.append(nodes.add())
    until_committed(work, 4, process)
    nodes.lose(nodes.workers.pop(0))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    report = json.loads(out)
    assert_complete_and_once(work, report)
    assert new(report)["train"] == PASSAGES
    nodes.workers.append(nodes.add())


def test_the_driver_killed_and_started_again(work: Workspace) -> None:
    process = work.start("run", "-c", "config.yaml")
    until_committed(work, 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    report = work.report()
    assert_complete_and_once(work, report)
    assert 0 < stage(report, "train")["earlier"] < PASSAGES
