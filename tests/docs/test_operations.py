"""What the docs tell an operator to type or to watch is there, and does what it says."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
from pathlib import Path

import pytest

from prag_core.errors import EXIT_CODES

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs" / "guides"
REFERENCE = ROOT / "docs" / "reference"
RUNBOOK = (GUIDES / "runbook.md").read_text(encoding="utf-8")


def sections(page: Path) -> dict[str, str]:
    """The text under each heading of the second level."""
    parts = re.split(r"^## (.*)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_alarms_name_metrics_that_exist() -> None:
    code = (ROOT / "pipelines" / "execution" / "metrics.py").read_text(encoding="utf-8")
    metrics = set(re.findall(r'"(prag_[a-z_]+)"', code))
    page = (REFERENCE / "metrics.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\bray_(prag_[a-z_]+)", page)) == metrics
    alarms = set(re.findall(r"\bray_(prag_[a-z_]+)", RUNBOOK))
    assert alarms
    assert alarms <= metrics


def test_each_exit_code_has_an_entry_that_says_what_to_type() -> None:
    entries = {title: text for title, text in sections(REFERENCE / "exit-codes.md").items() if title[0].isdigit()}
    assert list(entries) == [f"{code}: {meaning}" for code, meaning in EXIT_CODES.items()]
    for title, text in entries.items():
        assert re.search(r"^```\n.+\n```", text, re.MULTILINE | re.DOTALL), title


def test_the_runbook_knows_what_a_server_cannot_answer_and_a_full_disk() -> None:
    code = (ROOT / "pipelines" / "serving" / "errors.py").read_text(encoding="utf-8")
    refusals = set(re.findall(r'ApiError\(503, "(\w+)"', code))
    assert len(refusals) == 2
    assert set(re.findall(r"^## HTTP 503 `(\w+)`", RUNBOOK, re.MULTILINE)) == refusals
    assert os.strerror(errno.ENOSPC) in RUNBOOK


@pytest.fixture
def nightly(tmp_path: Path) -> tuple[str, Path]:
    """The command of the crontab, in a folder of its own, and its log; `prag` ends with the code in a file."""
    page = (GUIDES / "nightly.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith("0 2 * * * ")]
    assert "%" not in line  # it would end a crontab's command
    prag = tmp_path / "prag"
    prag.write_text(f"#!/bin/sh\necho asked: $*\nexit $(cat {tmp_path}/code)\n")
    prag.chmod(0o755)
    command = line.removeprefix("0 2 * * * ").replace("/opt/prag/bin/prag", str(prag))
    for folder in ("/var/lock", "/var/log"):
        assert folder in command
        command = command.replace(folder, str(tmp_path))
    return command, tmp_path / "prag-nightly.log"


def run(command: str) -> str:
    """What cron would mail."""
    done = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, timeout=30, env={"PATH": "/usr/bin:/bin"}
    )
    return done.stdout + done.stderr


def test_the_nightly_crontab_line(nightly: tuple[str, Path], tmp_path: Path) -> None:
    command, log = nightly
    (tmp_path / "code").write_text("0")
    assert run(command) == ""
    (tmp_path / "code").write_text("16")
    assert "exit code 16" in run(command)
    asked = "asked: submit -c /etc/prag/config.yaml --address http://HEAD:8265 -- reindex --wait 300\n"
    assert log.read_text() == asked * 2
    with (tmp_path / "prag-nightly.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "exit code 75" in run(command)
    assert log.read_text() == asked * 2
