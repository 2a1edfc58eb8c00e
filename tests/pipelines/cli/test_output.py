"""What reaches the terminal: the result on standard output, this project's lines on standard error, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Writes as Ray and other libraries do: from C, from a process that it starts, by print, and by their loggers.
COMMAND = """
import logging, os, subprocess, sys
from pipelines.cli.terminal import print_raw, progress_to, result_only

logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s: %(message)s")
with result_only(tell="tell" in sys.argv):
    if "quiet" not in sys.argv:
        os.write(2, b"E core_worker.cc: of no use\\n")
        subprocess.run(["sh", "-c", "echo a process >&2; echo its output"], stdout=2)
        print("printed by a library")
        logging.getLogger("ray.serve").warning("a foreign warning")
    logging.getLogger("pipelines.jobs").warning("a warning of ours")
    progress_to.print("our progress")
    if "fail" in sys.argv:
        raise ValueError("no")
print_raw("the result\\n")
"""


def run(folder: Path, *arguments: str) -> tuple[str, str, int]:
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "TMPDIR": str(folder)},
    )  # fmt: skip
    return ended.stdout, ended.stderr, ended.returncode


def test_lines_of_libraries_go_to_a_file_whose_place_is_told(tmp_path: Path) -> None:
    out, err, _ = run(tmp_path, "tell")
    (log,) = tmp_path.glob("prag-*.log")
    assert out == "the result\n"
    assert err == (
        f"messages of Ray and other libraries: {log}\nWARNING pipelines.jobs: a warning of ours\nour progress\n"
    )
    written = log.read_text()
    for line in ("E core_worker.cc: of no", "a process", "its output", "printed by a library", "ray.serve: a"):
        assert line in written
    assert "a warning of ours" not in written


@pytest.mark.parametrize("how", ["quiet", "tell"])
def test_an_empty_file_is_removed(tmp_path: Path, how: str) -> None:
    out, err, code = run(tmp_path, "quiet", how)
    assert (out, code) == ("the result\n", 0)
    assert "our progress" in err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_command_says_where_the_lines_are(tmp_path: Path) -> None:
    _, err, code = run(tmp_path, "fail")
    (log,) = tmp_path.glob("prag-*.log")
    assert code == 1
    assert f"messages of libraries: {log}\n" in err
    assert "ValueError: no" in err  # what comes after the command is on the terminal again
