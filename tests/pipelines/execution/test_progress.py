"""What people see of a stage: how far it is within a batch, on the console and in `progress.json`."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
import ray
from rich.console import Console

from pipelines.execution.board import BoardReader, BoardWriter
from pipelines.execution.outcomes import Outcome, Tally
from pipelines.execution.progress import RunProgress, stage_progress
from pipelines.execution.spinner import spinner
from prag_core.store.objects import Store


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def shown(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_what_is_being_worked_on_counts_for_the_share_and_not_as_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.execution.progress._SECONDS_BETWEEN_LINES", 0.0)
    console = Console(file=io.StringIO(), width=200)
    with stage_progress(console, "train", 10) as show:
        show(2, 1, 4.0)
        show(2, 1, 0.0)  # a batch has left the board before its outcomes came: the share does not fall
        show(6, 1, 9.0)  # and the other way about
    lines = shown(console).splitlines()
    assert [line.partition(",")[0] for line in lines[1:]] == [
        "train: 3/10 (70%)", "train: 3/10 (70%)", "train: 7/10 (100%)",
    ]  # fmt: skip


def test_a_bar_shows_what_is_done() -> None:
    console = terminal()
    with stage_progress(console, "train", 10) as show:
        show(2, 1, 4.0)
    assert "3/10" in shown(console)
    assert "1 rejected" in shown(console)


def test_a_log_gets_a_line_at_the_beginning_and_one_at_the_end() -> None:
    console = Console(file=io.StringIO(), width=200)
    with stage_progress(console, "train", 4) as show:
        show(0, 0, 1.5)  # too soon after the first line
        show(4, 0)
    first, last = shown(console).splitlines()
    assert first == "train: 4 to do"
    assert last.startswith("train: 4/4, ")
    assert last.endswith(" passages/s, 0 rejected")


def test_a_spinner_is_for_terminals_alone_and_leaves_nothing() -> None:
    log = Console(file=io.StringIO())
    with spinner(log, "starting Ray"):
        pass
    assert shown(log) == ""
    console = terminal()
    with spinner(console, "starting [Ray]"):
        pass
    assert "starting [Ray]" in shown(console)
    assert shown(console).endswith("\x1b[2K")  # its line is erased


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_the_document_says_how_far_the_workers_are(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    progress = RunProgress(store, "r1", Console(quiet=True))

    @ray.remote
    class Worker:
        def __init__(self, board: object) -> None:
            self._writer = BoardWriter(board)

        def work(self, passages: float) -> None:
            self._writer.write(passages)

        def end(self) -> None:
            self._writer.end()

    worker = Worker.remote(progress.board)
    tally = Tally()
    with progress.stage("train", 8, tally) as advance:
        ray.get(worker.work.remote(2.0))
        ray.get(worker.work.remote(3.0))  # within a second of the first: it is not sent
        deadline = time.monotonic() + 30
        while (share := store.get_json("runs/r1/progress.json")["current"]["share"]) == 0.0:
            assert time.monotonic() < deadline, "the board was never read"
            time.sleep(0.1)
        assert share == 0.25
        ray.get(worker.end.remote())
        advance([Outcome("a"), Outcome("b", rejected="timeout")])
        assert (tally.done, tally.rejected.total()) == (1, 1)
        assert ray.get(progress.board.total.remote()) == 0.0


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_a_board_that_is_gone_costs_only_what_it_shows() -> None:
    board = BoardReader()
    assert board.read() == 0.0
    ray.kill(board.handle)
    assert board.read() == 0.0
    board.clear()
