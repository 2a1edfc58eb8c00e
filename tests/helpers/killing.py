"""A cluster, drivers and a store to kill: real processes, joined by RAY_ADDRESS, ended by SIGKILL."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

WAIT_S = 240.0
# Whatever this machine's user has set: no side looks for a token.
AUTH = {"RAY_AUTH_MODE": "disabled"}


class Cluster:
    """A Ray of its own ports that outlives its drivers; `workers` finds the processes of its actors."""

    def __init__(self, process: subprocess.Popen[bytes], address: str, folder: Path) -> None:
        self._process = process
        self._folder = folder
        self.address = address

    def logs_with(self, text: str) -> list[Path]:
        """Return the log files of the cluster that hold a text."""
        logs = [path for path in self._folder.glob("session_*/logs/**/*") if path.is_file()]
        assert logs
        return [path for path in logs if text.encode() in path.read_bytes()]

    def workers(self, stage: str) -> tuple[list[psutil.Process], list[psutil.Process]]:
        return stage_workers(psutil.Process(self._process.pid), stage)


def stage_workers(root: psutil.Process, stage: str) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Return a stage's processes below a process: its Ray actors, and the children that do the work.

    An actor forks its children from a process that was told to import the stage's module.
    """
    actors, children = [], []
    for process in root.children(recursive=True):
        try:
            if stage in " ".join(process.cmdline()):
                parent = process.parent()
                if parent is not None and stage in " ".join(parent.cmdline()):
                    children.append(process)
                elif parent is not None:
                    actors.append(parent)
        except psutil.Error:
            continue
    return actors, children


@contextmanager
def cluster(variables: dict[str, str]) -> Iterator[Cluster]:
    """Start a Ray head in the foreground of a process of its own, and end that process afterwards.

    `variables` are what its nodes have in their environment.
    """
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # sockets below it may not have long paths
    port, client_port = free_ports(2)
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--port={port}", f"--ray-client-server-port={client_port}", f"--temp-dir={folder}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--include-dashboard=false", "--num-cpus=4"]
    command += [f"--object-store-memory={200 * 2**20}", "--node-ip-address=127.0.0.1"]
    environment = {**os.environ, **variables, **AUTH, "RAY_idle_worker_killing_time_threshold_ms": "600000"}
    log = Path(folder) / "start.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        wait(lambda: is_open(port), f"the cluster does not start: {log}")
        yield Cluster(process, f"127.0.0.1:{port}", Path(folder))
    finally:
        end_tree(process)
        shutil.rmtree(folder, ignore_errors=True)


def end_tree(process: subprocess.Popen[Any]) -> None:
    """Kill a process that was started here, and all that it started: Ray's own way to end takes half a minute."""
    for left in psutil.Process(process.pid).children(recursive=True):
        if left.is_running():
            left.kill()
    process.kill()
    process.wait()


class Driver:
    """A command of `prag`, by default `prag run`, in a process of its own."""

    def __init__(self, settings: dict[str, Any], environment: dict[str, str], folder: Path, *command_line: str) -> None:
        name = folder / f"run-{time.monotonic_ns()}"
        self.log, self._report, config = (name.with_suffix(suffix) for suffix in (".log", ".json", ".yaml"))
        config.write_text(yaml.safe_dump(settings))
        arguments = command_line or ("run",)
        command = [sys.executable, "-m", "pipelines.cli", *arguments, "-c", str(config), "--json"]
        with self.log.open("wb") as err, self._report.open("wb") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=err, env={**os.environ, **environment, **AUTH}, start_new_session=True
            )

    @property
    def joins(self) -> bool:
        """Whether it has imported what it needs, and found nothing wrong."""
        return b"starting Ray" in self.log.read_bytes()

    def ends_within(self, seconds: float) -> bool:
        """Wait so long at most; return whether the driver has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    def kill(self) -> bool:
        """End it as nothing can refuse, and wait until it is gone; return whether it had not ended by itself."""
        self._process.kill()
        return self._process.wait() == -signal.SIGKILL

    def report(self) -> dict[str, Any] | None:
        """Return what the run said of itself, or None when it failed or was killed."""
        return json.loads(self._report.read_bytes()) if self._process.returncode == 0 else None


def wait(until: Callable[[], object], otherwise: str) -> None:
    """Wait until something is so.

    Raises:
        AssertionError: with `otherwise`, when it is not within four minutes.
    """
    deadline = time.monotonic() + WAIT_S
    while not until():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


def is_open(port: int) -> bool:
    """Whether somebody listens at a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens at now."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
