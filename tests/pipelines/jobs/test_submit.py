"""`prag submit` with a real Ray head and its job server: the same work is one job, followed to its end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import select
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.killing import end_tree, free_ports
from tests.helpers.passages import make_passage
from tests.helpers.workspace import Workspace

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PASSAGES = 8


class Head:
    """A Ray head in its own processes, with a dashboard and a job server that asks for the test's token."""

    def __init__(self, folder: Path) -> None:
        self.token = secrets.token_hex(16)
        port, dashboard, agent, agent_grpc, self.metrics_port, client = free_ports(6)
        self.address = f"http://127.0.0.1:{dashboard}"
        binaries = str(Path(sys.executable).parent)
        environment = {
            **os.environ,
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_idle_worker_killing_time_threshold_ms": "600000",
            "RAY_metrics_report_interval_ms": "500",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
        }
        command = [f"{binaries}/ray", "start", "--head", "--block", "--num-cpus=3", "--object-store-memory=200000000"]
        command += [f"--port={port}", "--include-dashboard=true", f"--dashboard-port={dashboard}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
        command += [f"--metrics-export-port={self.metrics_port}", f"--ray-client-server-port={client}"]
        # Its own folder, so that no other Ray on this machine joins this cluster by mistake; a short path, because the
        # names of sockets must be short.
        command += [f"--temp-dir={folder}"]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait(self) -> None:
        deadline = time.monotonic() + 120
        while not self.answers():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def answers(self) -> bool:
        # The job server accepts jobs once the head's agent is up, which is after the dashboard answers.
        with contextlib.suppress(OSError):
            request = urllib.request.Request(
                f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {self.token}"}
            )
            return urllib.request.urlopen(request, timeout=5).status == 200
        return False

    def metrics(self) -> str:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5).read().decode()
        return ""

    def stop(self) -> None:
        end_tree(self.process)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        head = Head(Path(folder))
        try:
            head.wait()
            patch.setenv("RAY_AUTH_MODE", "token")
            patch.setenv("RAY_AUTH_TOKEN", head.token)
            yield head
        finally:
            head.stop()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("submit")
    work = Workspace(folder, [make_passage(n) for n in range(PASSAGES)])
    work.configure(run={"actor_gpus": 0, "actor_cpus": 1, "actors_max": 1, "partitions": 2, "train_batch": 2})
    return work


def until_line(process: subprocess.Popen, text: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(process.communicate()[1][-3000:])


def test_all_who_submit_a_job_follow_the_same_one(head: Head, work: Workspace) -> None:
    submit = ["submit", "-c", "config.yaml", "--address", head.address, "run"]
    first = work.start(*submit)
    id = until_line(first, "submitted").split()[1].rstrip(":")
    second = work.start(*submit)
    assert id in until_line(second, "runs already")
    # While it runs, Prometheus has the counts and the start of the training stage, and not those of ended stages.
    told, began = "", {}
    while first.poll() is None and not ('stage="train"' in told and set(began) == {"train"}):
        metrics = head.metrics()
        told = "\n".join(line for line in metrics.splitlines() if "prag_passages_total{" in line)
        began = dict(re.findall(r'prag_stage_start_time_seconds{.*?stage="(\w+)".*?} ([\d.e+]+)', metrics))
        time.sleep(0.2)
    assert 'stage="augment"' in told
    assert 'outcome="done"' in told
    assert time.time() - 120 < float(began["train"]) <= time.time()
    # It can be followed to the same end from the store alone.
    watched = work.run_alone("status", "-c", "config.yaml", "--watch", "--every", "0.3").splitlines()
    assert "finished" in watched[-1]
    for process in (first, second):
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
        assert f"job {id}: succeeded" in out
        assert f"train: {PASSAGES} of {PASSAGES} done in " in out
    status = json.loads(work.run("status", "-c", "config.yaml", "--json"))
    assert [run["state"] for run in status["runs"]] == ["finished"]
    assert status["snapshot"]["adapters"] == PASSAGES
    (progress,) = (work.folder / "store" / "runs").glob("*/progress.json")
    assert [stage["stage"] for stage in json.loads(progress.read_text())["stages"]] == [
        "corpus",
        "augment",
        "train",
        "index",
    ]


def test_a_failed_job_gives_its_exit_code_and_is_submitted_again(head: Head, work: Workspace) -> None:
    lost = ["--set", f"corpus.path={work.folder}/none.jsonl"]
    submit = ["submit", "-c", "config.yaml", *lost, "--address", head.address]
    process = work.start(*submit, "run")
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 3, out
    assert "none.jsonl: no such file or folder" in out
    id = next(line for line in out.splitlines() if "submitted" in line).split()[1].rstrip(":")
    assert id.count("-") == 2
    assert f"{id}-2: submitted" in work.run_alone(*submit, "--no-wait", "run")


class ImpatientProxy(socketserver.BaseRequestHandler):
    """A relay to a job server that cuts a connection after two seconds of silence."""

    upstream: tuple[str, int]

    def handle(self) -> None:
        with socket.create_connection(self.upstream) as there:
            others = {self.request: there, there: self.request}
            while ready := select.select([*others], [], [], 2.0)[0]:
                for end in ready:
                    data = end.recv(65536)
                    if not data:
                        return
                    others[end].sendall(data)


def test_a_refused_token_is_reported(head: Head, work: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    message = work.run_alone("submit", "-c", "config.yaml", "--address", head.address, "run", code=12)
    assert f"the job server at {head.address} refuses the token" in message
    assert "Traceback" not in message


# Run in its own process: Ray reads its token once a process, and another test may already have used one.
FOLLOW = """
import sys
from pathlib import Path
from cluster import jobs
jobs.SERVER_TIMEOUT_S = 3.0
server, proxy, folder = sys.argv[1:]
job = jobs.submit(jobs.connect(server), "silent", "echo begun; sleep 6; echo ended", Path(folder), {})
ended = jobs.follow(jobs.connect(proxy), job.id, lambda said: print(said, end="", flush=True))
print(ended.status, ended.exit_code)
"""


def test_a_silent_job_is_followed_to_its_end(head: Head, tmp_path: Path) -> None:
    host, _, port = head.address.removeprefix("http://").partition(":")
    handler = type("Proxy", (ImpatientProxy,), {"upstream": (host, int(port))})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        impatient = "http://{}:{}".format(*proxy.server_address)
        command = [sys.executable, "-c", FOLLOW, head.address, impatient, str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
        proxy.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line in ("begun", "ended")]
    assert (lines, done.stdout.splitlines()[-1]) == (["begun", "ended"], "SUCCEEDED 0")


def test_paths_that_the_cluster_cannot_see_are_refused(work: Workspace) -> None:
    message = work.run("submit", "-c", "config.yaml", "--set", "store=store", "run", code=2)
    assert "store: relative to this folder" in message
    # The name of an initial adapter is no path: only the address of this command is wrong.
    start = ["--set", f"train.initial_adapter={'ab' * 16}"]
    message = work.run_alone("submit", "-c", "config.yaml", *start, "--address", "http://127.0.0.1:9", "run", code=12)
    assert "no job server answers at http://127.0.0.1:9" in message
