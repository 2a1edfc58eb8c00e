"""The status of runs is read from the store."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.execution.outcomes import StageReport
from pipelines.execution.progress import RunProgress
from pipelines.jobs.status import RunStatus, read_status, watch
from prag_core.errors import DamagedError, PragError, StoreError
from prag_core.store.objects import Store
from prag_core.store.runs import hold_lease

REPORT = StageReport(stage="corpus", taken=3, done=2, earlier=0, rejected={"empty_text": 1}, seconds=1.0)


@pytest.fixture
def progress(tmp_path: Path) -> RunProgress:
    store = Store(str(tmp_path / "store"))
    store.put("runs/r1/config.yaml", b"")
    return RunProgress(store, "r1", Console(quiet=True))


def store_of(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def test_a_run_is_running_while_it_holds_the_lease_and_stopped_after(progress: RunProgress, tmp_path: Path) -> None:
    store = store_of(tmp_path)
    with progress.running():
        with hold_lease(store, "r1"):
            progress.finish(REPORT)
            (run,) = read_status(store).runs
            assert (run.state, [stage["done"] for stage in run.stages]) == ("running", [2])
            assert "corpus 2/3" in run.line()
        # As after a kill: the document says running, but the lease is not renewed.
        (run,) = read_status(store).runs
        assert run.state == "stopped"
    (run,) = read_status(store).runs
    assert run.state == "finished"


def test_a_killed_run_is_stopped_at_once_on_its_own_machine(progress: RunProgress, tmp_path: Path) -> None:
    """The lease still counts for two minutes, but its process is gone."""
    script = (
        "import os, signal, sys; from prag_core.store.objects import Store; from prag_core.store.runs import *\n"
        "acquire_lease(Store(sys.argv[1]), 'r1'); print('taken', flush=True); signal.pause()"
    )
    store = store_of(tmp_path)
    with subprocess.Popen([sys.executable, "-c", script, store.url], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert read_status(store).runs[0].state == "running"
        process.kill()
        process.wait()
        assert read_status(store).runs[0].state == "stopped"


def test_a_failed_run_has_its_error_in_its_status(progress: RunProgress, tmp_path: Path) -> None:
    with pytest.raises(StoreError), progress.running():
        raise StoreError("the disk is full", "make room")
    (run,) = read_status(store_of(tmp_path)).runs
    assert run.state == "failed"
    assert "StoreError: the disk is full" in run.line()
    assert "make room" in run.error


def test_only_a_running_run_has_time_left() -> None:
    now = {"stage": "train", "done": 4, "total": 9, "share": 0.5, "rejected": {}, "passages_per_s": 0.1}
    running = RunStatus("r1", "running", current={**now, "seconds_left": 50})
    assert running.line() == "run r1: running; train 4/9 (50%) now, 0 rejected, 0.10 passages/s, 50 s left"
    assert replace(running, state="stopped").line() == "run r1: stopped; train 4/9 (50%), 0 rejected"


def test_a_finished_stage_is_told_in_one_line(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    progress = RunProgress(Store(str(tmp_path / "store")), "r1", console)
    progress.finish(StageReport("train", taken=12, done=11, earlier=3, rejected={"timeout": 1}, seconds=3.6))
    assert console.file.getvalue() == "train: 11 of 12 done in 3.6 s (3 reused, 1 rejected)\n"


def test_counts_that_do_not_add_up_end_the_run(progress: RunProgress) -> None:
    with pytest.raises(PragError, match="3 in, but 1 done"):
        progress.finish(StageReport("corpus", taken=3, done=1, earlier=0, rejected={}, seconds=1.0))


def test_a_run_without_progress_yet_is_listed(progress: RunProgress, tmp_path: Path) -> None:
    with hold_lease(store_of(tmp_path), "r1"):
        (run,) = read_status(store_of(tmp_path)).runs
        assert run.state == "running"


@pytest.mark.parametrize("text", ["[]", "{}", '{"run": "r1", "state": 5, "stages": []}', "[" * 100_000])
def test_damaged_progress_is_named(progress: RunProgress, tmp_path: Path, text: str) -> None:
    (tmp_path / "store" / "runs" / "r1" / "progress.json").write_text(text)
    with pytest.raises(DamagedError, match=r"runs/r1/progress\.json: not"):
        read_status(store_of(tmp_path))


def test_a_run_goes_on_if_its_progress_cannot_be_written(progress: RunProgress, tmp_path: Path) -> None:
    (tmp_path / "store" / "runs" / "r1" / "progress.json").mkdir()
    with progress.running():
        progress.finish(REPORT)
    assert progress.stages == (REPORT,)


def test_watching_ends_with_the_run(progress: RunProgress, tmp_path: Path) -> None:
    store = store_of(tmp_path)
    seen: list[str] = []
    finished = threading.Event()

    def look() -> None:
        for run in watch(store, 0.02):
            seen.append(run.state)
        finished.set()

    with hold_lease(store, "r1"), progress.running():
        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not seen:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        progress.finish(REPORT)
    assert finished.wait(30)
    assert seen[0] == "running"
    assert seen[-1] == "finished"


def test_a_store_without_runs(tmp_path: Path) -> None:
    assert read_status(store_of(tmp_path)).runs == ()
    assert list(watch(store_of(tmp_path), 60)) == []
