"""A signal ends a command at once: with a message, an exit code, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from prag_core.store.objects import Store
from prag_core.store.runs import hold_lease, read_lease
from tests.helpers.passages import make_passage
from tests.helpers.workspace import Workspace, stage

ROOT = Path(__file__).parents[3]
# A stop may take this long. In truth it takes some tenths of a second.
STOP_S = 5.0
WAIT_S = 120.0
CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]

# A command that holds the store's lease and a temporary folder, and has started a process, all below the folder of the
# first argument. It waits in a lock that never becomes free: no exception can reach it there.
COMMAND = """
import subprocess, sys, tempfile, threading
from pathlib import Path
from pipelines.cli.stopping import run_until_stopped
from prag_core.store.objects import Store
from prag_core.store.runs import hold_lease

folder = Path(sys.argv[1])

def command(stop):
    {before}
    child = subprocess.Popen(["sleep", "600"])
    with hold_lease(Store(str(folder / "store")), "a-run"), tempfile.TemporaryDirectory(dir=folder, prefix="scratch"):
        (folder / "begun").write_text(str(child.pid))
        lock = threading.Lock()
        with lock:
            lock.acquire()

run_until_stopped(command)
"""


@contextlib.contextmanager
def process(folder: Path, *command: str) -> Iterator[subprocess.Popen[str]]:
    """Start Python in a folder; its standard error goes to the file `err` there.

    Signals have their default effect in it, also where the tests run under nohup.
    """
    with (folder / "err").open("w") as err:
        started = subprocess.Popen(
            [sys.executable, *command], cwd=folder, stdout=subprocess.PIPE, stderr=err, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )  # fmt: skip
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def wait_for(path: Path, text: str = "") -> str:
    """Wait until a file holds a text; return all of it."""
    deadline = time.monotonic() + WAIT_S
    while not path.exists() or not (found := path.read_text()) or text not in found:
        assert time.monotonic() < deadline, f"{path} never held {text!r}"
        time.sleep(0.02)
    return found


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_stopped_command_says_so_and_gives_back_what_it_holds(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    # polars, which Ray's join imports, lets the system call that a SIGINT interrupts begin anew.
    script = COMMAND.format(before="import polars")
    with process(tmp_path, "-c", script, str(tmp_path)) as command:
        child = psutil.Process(int(wait_for(tmp_path / "begun")))
        command.send_signal(number)
        assert command.wait(STOP_S) == code
    said = (tmp_path / "err").read_text()
    assert "Stopped. Run the same command again to continue: prag " in said
    assert "Traceback" not in said
    lease = read_lease(Store(str(tmp_path / "store")))
    assert lease is not None
    assert lease.released
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert list(tmp_path.glob("scratch*")) == []


def test_under_nohup_a_command_outlives_its_terminal(tmp_path: Path) -> None:
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    with process(tmp_path, "-c", ignore + COMMAND.format(before="pass"), str(tmp_path)) as command:
        wait_for(tmp_path / "begun")
        command.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            command.wait(0.5)
        command.send_signal(signal.SIGTERM)
        assert command.wait(STOP_S) == 143


def test_a_store_that_does_not_answer_does_not_hold_the_stop_up(tmp_path: Path) -> None:
    hang = "import time; Store.swap = lambda *_: time.sleep(60) if stop.noted.is_set() else None"
    script = COMMAND.format(before=hang)
    with process(tmp_path, "-c", script, str(tmp_path)) as command:
        wait_for(tmp_path / "begun")
        command.send_signal(signal.SIGTERM)
        assert command.wait(STOP_S) == 143
    assert "Stopped." in (tmp_path / "err").read_text()


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_second_signal_does_not_wait_for_the_command(tmp_path: Path, number: signal.Signals, code: int) -> None:
    script = COMMAND.format(before="stop.awaited = True")
    with process(tmp_path, "-c", script, str(tmp_path)) as command:
        wait_for(tmp_path / "begun")
        command.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            command.wait(0.5)
        command.send_signal(number)
        assert command.wait(STOP_S) == code


def test_a_command_that_is_awaited_ends_by_itself(tmp_path: Path) -> None:
    script = (
        "from pipelines.cli.stopping import run_until_stopped\n"
        "def command(stop):\n"
        "    stop.awaited, stop.remedy = True, 'All is answered.'\n"
        "    open('begun', 'w').write('yes')\n"
        "    stop.noted.wait()\n"
        "    open('drained', 'w').write('yes')\n"
        "run_until_stopped(command)\n"
    )
    with process(tmp_path, "-c", script) as command:
        wait_for(tmp_path / "begun")
        command.send_signal(signal.SIGTERM)
        assert command.wait(STOP_S) == 143
    assert (tmp_path / "drained").read_text() == "yes"
    assert "Stopped. All is answered." in (tmp_path / "err").read_text()


@pytest.fixture
def work(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path, [make_passage(n) for n in range(12)])


def test_whoever_watches_a_run_may_stop_watching(work: Workspace) -> None:
    store = Store(str(work.folder / "store"))
    store.put("runs/r1/config.yaml", b"")
    with (
        hold_lease(store, "r1"),
        process(work.folder, "-m", "pipelines.cli", "status", "-c", "config.yaml", "--watch") as command,
    ):
        assert command.stdout is not None
        assert "running" in command.stdout.readline()
        command.send_signal(signal.SIGINT)
        assert command.wait(STOP_S) == 130
    said = (work.folder / "err").read_text()
    assert "Stopped. The run goes on" in said
    assert "prag status -c config.yaml --watch" in said


@pytest.mark.slow
def test_a_run_is_stopped_while_it_trains_and_then_continues(work: Workspace) -> None:
    work.configure(train={"epochs": 15}, run={"train_batch": 4, "augment_batch": 8, "commit_every_s": 0})
    store = Store(str(work.folder / "store"))
    with process(work.folder, "-m", "pipelines.cli", "run", "-c", "config.yaml") as command:
        wait_for(work.folder / "err", "train: 12 to do")
        deadline = time.monotonic() + WAIT_S
        while not (before := store.list("adapters", ".parquet")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        started = psutil.Process(command.pid).children(recursive=True)
        command.send_signal(signal.SIGTERM)
        assert command.wait(STOP_S) == 143
    said = (work.folder / "err").read_text()
    assert said.rstrip().endswith("Run the same command again to continue: prag run -c config.yaml")
    assert "Traceback" not in said
    assert "SIGTERM received" not in said
    _, alive = psutil.wait_procs(started, STOP_S)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    lease = read_lease(store)
    assert lease is not None
    assert lease.released
    progress = store.get_json(f"runs/{lease.run}/progress.json")
    assert progress["state"] == "stopped"
    # The same command goes on with what is missing.
    trained = stage(json.loads(work.run_alone("run", "-c", "config.yaml", "--json")), "train")
    assert trained["done"] == 12
    assert trained["earlier"] >= len(before)
